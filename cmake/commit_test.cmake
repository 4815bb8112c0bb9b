# cmake -DWORK=<folder> -P commit_test.cmake
#
# What commit.cmake takes for another build: edits and commits of the sources, not of results.
cmake_minimum_required(VERSION 3.25)

find_program(GIT git REQUIRED)
unset(ENV{SIKV_COMMIT})
file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK}/framework ${WORK}/docs/results)

function(git)
  execute_process(COMMAND ${GIT} -C ${WORK} -c user.name=test -c user.email=test@localhost ${ARGN}
    OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
endfunction()
function(commit_all MESSAGE)
  git(add --all)
  git(commit --quiet --message ${MESSAGE})
endfunction()
function(commit_of_build OUT)
  execute_process(
    COMMAND ${CMAKE_COMMAND} -DSOURCE=${WORK} -DOUT=${WORK}.h -P ${CMAKE_CURRENT_LIST_DIR}/commit.cmake
    COMMAND_ERROR_IS_FATAL ANY)
  file(READ ${WORK}.h header)
  string(REGEX REPLACE ".*\"(.*)\".*" "\\1" commit "${header}")
  set(${OUT} ${commit} PARENT_SCOPE)
endfunction()
function(expect_same A B WHAT)
  if(NOT "${A}" STREQUAL "${B}")
    message(FATAL_ERROR "${WHAT}: ${B}, not ${A}")
  endif()
endfunction()

git(init --quiet)
commit_of_build(none)
expect_same(unknown "${none}" "before the first commit")
file(WRITE ${WORK}/framework/a.cc "int a;\n")
file(WRITE ${WORK}/docs/results/a.json "{}\n")
commit_all(first)
commit_of_build(first)
if(NOT first MATCHES "^[0-9a-f]+$")
  message(FATAL_ERROR "the first commit: ${first}")
endif()

file(WRITE ${WORK}/docs/results/a.json "{\"rows\": []}\n")
commit_of_build(edited_results)
expect_same(${first} "${edited_results}" "results were written")
commit_all(results)
commit_of_build(committed_results)
expect_same(${first} "${committed_results}" "results were committed")

file(WRITE ${WORK}/framework/a.cc "int b;\n")
commit_of_build(edited)
expect_same(${first}-dirty "${edited}" "a source was edited")
commit_all(second)
commit_of_build(second)
if(second STREQUAL first OR NOT second MATCHES "^[0-9a-f]+$")
  message(FATAL_ERROR "a source was committed: ${second}")
endif()
