// Ctrl-C as an exception: the signal sets a flag, long loops ask for it, and stack unwinding
// removes temporaries on the way out.
#ifndef SIKV_FRAMEWORK_BASE_INTERRUPT_H_
#define SIKV_FRAMEWORK_BASE_INTERRUPT_H_

namespace sikv {

// From now on SIGINT and SIGTERM set the flag. The second one ends the process the ordinary way, so
// that a loop that never asks can still be stopped.
void install_interrupt_handler();

bool interrupted();

// Throws Interrupted once the flag is set.
void check_interrupt();

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_BASE_INTERRUPT_H_
