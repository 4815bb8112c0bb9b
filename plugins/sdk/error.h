// How a plugin says no. Throw these; the SDK turns them into ABI codes and messages.
#ifndef SIKV_PLUGINS_SDK_ERROR_H_
#define SIKV_PLUGINS_SDK_ERROR_H_

#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>

#include "plugins/abi/sikv_abi.h"

namespace sikv {

// The caller's fault: one sentence with the offending value and the remedy.
class Refused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A bug in the plugin.
class PluginBug : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

namespace sdk {

inline void write_message(sikv_message* message, const char* text) {
  if (message != nullptr) std::snprintf(message->text, sizeof message->text, "%s", text);
}

// Runs `body` and turns whatever it throws into a code and a message.
template <typename Body>
int32_t guarded(sikv_message* why, Body&& body) noexcept {
  try {
    body();
    return SIKV_OK;
  } catch (const Refused& refused) {
    write_message(why, refused.what());
    return SIKV_REFUSED;
  } catch (const std::bad_alloc&) {
    write_message(
        why,
        "it needs more memory than there is: lower batch, context or the sizes among its options");
    return SIKV_REFUSED;
  } catch (const std::exception& error) {
    write_message(why, error.what());
  } catch (...) {
    write_message(why, "an exception that is not a std::exception");
  }
  return SIKV_INTERNAL;
}

// Calls back through the ABI (another plugin's table) and throws what it answered.
template <typename Call>
void checked(Call&& call) {
  sikv_message why{};
  const int32_t status = call(&why);
  if (status == SIKV_REFUSED) throw Refused(why.text);
  if (status != SIKV_OK) throw PluginBug(why.text);
}

}  // namespace sdk
}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_ERROR_H_
