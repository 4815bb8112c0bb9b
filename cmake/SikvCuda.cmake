# sikv_add_cuda_sources(TARGET [CUDA file.cu...] [ELSE file.cc...])
#
# Adds kernels to a library of the framework, or what stands in for them without SIKV_CUDA.
function(sikv_add_cuda_sources TARGET)
  cmake_parse_arguments(ARG "" "" "CUDA;ELSE" ${ARGN})
  if(NOT SIKV_CUDA)
    target_sources(${TARGET} PRIVATE ${ARG_ELSE})
    return()
  endif()
  target_sources(${TARGET} PRIVATE ${ARG_CUDA})
  target_compile_options(${TARGET} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr --extended-lambda -lineinfo>)
  set_target_properties(${TARGET} PROPERTIES CUDA_RUNTIME_LIBRARY Shared)
  target_link_libraries(${TARGET} PUBLIC CUDA::cudart)
endfunction()
