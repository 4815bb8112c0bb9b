// Rotary position embedding with the scaling rules of Hugging Face's configurations: linear,
// llama3, yarn, and `factors` (D/2 divisors of the frequencies, all that a GGUF file says).
#ifndef SIKV_FRAMEWORK_MODEL_ROPE_H_
#define SIKV_FRAMEWORK_MODEL_ROPE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace sikv {

class Rope {
 public:
  // `scaling`: JSON, or "" for none; Error if the rule is unknown or lacks a number.
  Rope(int head_dim, double theta, const std::string& scaling);

  // Radians per position [D/2], and the factor of cos and sin.
  const std::vector<double>& frequencies() const { return frequencies_; }
  double magnitude() const { return magnitude_; }

  // turn [2, D/2] = cos and sin at a position. Angles are fp64: at position 8000 an fp32 angle is
  // off by 2e-4 rad already.
  void turn(int64_t position, float* turn) const;

  // Rotates x [heads, D] in place: channel i pairs with i + D/2.
  static void rotate(const float* turn, int heads, int head_dim, float* x);

 private:
  std::vector<double> frequencies_;
  double magnitude_ = 1;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_ROPE_H_
