# cmake -DSOURCE=<tree> -DOUT=<header> -P commit.cmake
#
# Writes the commit of SOURCE as a header. Run at every build; the header keeps its date while it
# stays true, so that only a commit rebuilds what includes it.
cmake_minimum_required(VERSION 3.25)

set(commit unknown)
find_program(GIT git)
if(DEFINED ENV{SIKV_COMMIT})  # of a copy without its repository
  set(commit $ENV{SIKV_COMMIT})
elseif(GIT)
  execute_process(
    COMMAND ${GIT} -C ${SOURCE} describe --always --abbrev=12 --dirty --exclude=*
    OUTPUT_VARIABLE described RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT failed)
    set(commit ${described})
  endif()
endif()
file(CONFIGURE OUTPUT ${OUT} CONTENT "#define SIKV_COMMIT \"@commit@\"\n" @ONLY)
