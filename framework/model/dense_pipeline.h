// What every sparse number of a model stands beside: all tokens attended to, as fp16.
#ifndef SIKV_FRAMEWORK_MODEL_DENSE_PIPELINE_H_
#define SIKV_FRAMEWORK_MODEL_DENSE_PIPELINE_H_

namespace sikv {

inline constexpr const char* kDensePipeline = "fp16+fp16 > full(pinned=0) > dense_attention";

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_DENSE_PIPELINE_H_
