// Why a GPU is not used, as sentences with the remedy, apart from the runtime that is asked.
#ifndef SIKV_FRAMEWORK_DEVICE_CUDA_REFUSAL_H_
#define SIKV_FRAMEWORK_DEVICE_CUDA_REFUSAL_H_

#include <string>

namespace sikv {

// Where the runtime finds no driver that suffices: `driver` is the CUDA version it serves, 0 without
// one. Versions are 1000 * major + 10 * minor.
std::string driver_refusal(int driver, int built_with);

// Empty if GPU `ordinal` is one of `count`.
std::string ordinal_refusal(int ordinal, int count);

// Empty if a GPU of `architecture` runs code for `oldest`; both are numbers as in sm_90.
std::string architecture_refusal(int ordinal, int architecture, int oldest);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_DEVICE_CUDA_REFUSAL_H_
