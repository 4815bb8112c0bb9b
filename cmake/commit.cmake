# cmake -DSOURCE=<tree> -DOUT=<header> -P commit.cmake
#
# Writes the commit of SOURCE as a header: the last one that changed what sikv is built from or reads, with
# "-dirty" behind it where that was edited since. Results are resumed and compared by it, so neither
# a result that is written into the tree nor a commit of one makes another build. Run at every build;
# the header keeps its date while it stays true, so that only such a commit rebuilds what includes it.
cmake_minimum_required(VERSION 3.25)

set(sources CMakeLists.txt CMakePresets.json apps cmake codecs datasets framework kernels plugins
  selectors)
set(commit unknown)
find_program(GIT git)
if(DEFINED ENV{SIKV_COMMIT})  # of a copy without its repository
  set(commit $ENV{SIKV_COMMIT})
elseif(GIT)
  execute_process(
    COMMAND ${GIT} -C ${SOURCE} log -1 --abbrev=12 --format=%h -- ${sources}
    OUTPUT_VARIABLE last RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT failed AND last)
    execute_process(COMMAND ${GIT} -C ${SOURCE} diff --quiet HEAD -- ${sources}
      RESULT_VARIABLE edited ERROR_QUIET)
    set(commit ${last})
    if(edited)
      string(APPEND commit -dirty)
    endif()
  endif()
endif()
file(CONFIGURE OUTPUT ${OUT} CONTENT "#define SIKV_COMMIT \"@commit@\"\n" @ONLY)
