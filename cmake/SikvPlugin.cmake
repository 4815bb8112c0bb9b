# sikv_add_plugin(codec|selector|kernel ID [DEVICE cpu|cuda] [FASTER_PATHS text] SOURCES file...
#                 [SIMD file...])
#
# One plugin library, libsikv-<family>-<id>-<device>.so, with everything hidden but its two
# exported symbols. SIMD files need Highway and are left out, with SIKV_HAS_SIMD undefined, where
# it is missing. Of DEVICE cuda nothing is built without SIKV_CUDA; FASTER_PATHS says what it chooses
# at run time on newer GPUs. Serves this tree and, through find_package(sikv), plugins built out of
# tree.
function(sikv_add_plugin FAMILY ID)
  cmake_parse_arguments(ARG "" "DEVICE;FASTER_PATHS" "SOURCES;SIMD" ${ARGN})
  if(NOT ARG_DEVICE)
    set(ARG_DEVICE cpu)
  endif()
  if(ARG_FASTER_PATHS AND NOT ARG_DEVICE STREQUAL "cuda")
    message(FATAL_ERROR "plugin ${ID} names FASTER_PATHS, which are of DEVICE cuda: leave them out")
  endif()
  string(LENGTH "${ARG_FASTER_PATHS}" length)
  if(length GREATER 127)
    message(FATAL_ERROR "FASTER_PATHS of plugin ${ID} has ${length} characters: shorten it to 127")
  endif()
  if(ARG_DEVICE STREQUAL "cuda" AND NOT SIKV_CUDA)
    return()
  endif()
  set(target sikv-${FAMILY}-${ID}-${ARG_DEVICE})
  add_library(${target} MODULE ${ARG_SOURCES})
  target_link_libraries(${target} PRIVATE sikv::sdk)
  set(exports ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/plugin_exports.map)
  target_link_options(${target} PRIVATE LINKER:--version-script=${exports})
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${exports})
  target_compile_definitions(${target} PRIVATE SIKV_BUILD_ID="${PROJECT_NAME}-${PROJECT_VERSION}")
  if(ARG_SIMD AND SIKV_SIMD)
    target_sources(${target} PRIVATE ${ARG_SIMD})
    target_compile_definitions(${target} PRIVATE SIKV_HAS_SIMD=1)
    target_link_libraries(${target} PRIVATE hwy::hwy)
  endif()
  if(ARG_DEVICE STREQUAL "cuda")
    # One runtime for all plugins of a process; device code of a library is its own.
    set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Shared)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr --extended-lambda -lineinfo>)
    list(TRANSFORM CMAKE_CUDA_ARCHITECTURES PREPEND "sm_" OUTPUT_VARIABLE architectures)
    list(TRANSFORM architectures REPLACE "-(real|virtual)$" "")
    list(JOIN architectures "," architectures)
    target_compile_definitions(${target} PRIVATE SIKV_PLUGIN_ARCHITECTURES="${architectures}"
      SIKV_PLUGIN_FASTER_PATHS="${ARG_FASTER_PATHS}")
    add_dependencies(sikv_cuda ${target})
  endif()
  set_target_properties(${target} PROPERTIES
    CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib/sikv/plugins)
  install(TARGETS ${target} LIBRARY DESTINATION lib/sikv/plugins)
  set_property(GLOBAL APPEND PROPERTY SIKV_PLUGIN_TARGETS ${target})
endfunction()
