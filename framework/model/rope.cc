#include "framework/model/rope.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <optional>

#include "framework/base/error.h"

namespace sikv {
namespace {

using Json = nlohmann::json;

class Scaling {
 public:
  explicit Scaling(const std::string& text) : json_(Json::parse(text, nullptr, false)) {
    if (!json_.is_object() || !json_.contains("rope_type") || !json_["rope_type"].is_string()) {
      throw Error("rope_scaling is '{}'; it must be a JSON object with a rope_type", text);
    }
  }

  std::string type() const { return json_["rope_type"]; }

  std::optional<double> find(const char* name) const {
    const auto found = json_.find(name);
    if (found == json_.end()) return std::nullopt;
    if (found->is_boolean()) return found->get<bool>() ? 1.0 : 0.0;
    if (!found->is_number()) return std::nullopt;
    return found->get<double>();
  }
  double positive(const char* name) const {
    const auto value = find(name);
    if (!value || !(*value > 0)) {
      throw Error("rope_scaling of type {} needs a positive '{}'", type(), name);
    }
    return *value;
  }
  std::vector<double> divisors(size_t count) const {
    const auto found = json_.find("factors");
    const bool good = found != json_.end() && found->is_array() && found->size() == count &&
                      std::all_of(found->begin(), found->end(), [](const Json& factor) {
                        return factor.is_number() && factor.get<double>() > 0;
                      });
    if (!good) throw Error("rope_scaling needs {} positive 'factors'", count);
    return found->get<std::vector<double>>();
  }

 private:
  Json json_;
};

// Llama 3.1: channels that turn fewer than low_freq_factor times within the original context are
// slowed down by `factor`, those beyond high_freq_factor left alone, linearly between.
void scale_llama3(const Scaling& scaling, std::vector<double>& frequencies) {
  const double context = scaling.positive("original_max_position_embeddings");
  const double factor = scaling.positive("factor");
  const double low = scaling.positive("low_freq_factor");
  const double high = scaling.positive("high_freq_factor");
  if (low >= high) throw Error("rope_scaling: low_freq_factor must be below high_freq_factor");
  for (double& frequency : frequencies) {
    const double turns = context * frequency / (2 * std::numbers::pi);
    const double keep = std::clamp((turns - low) / (high - low), 0.0, 1.0);
    frequency *= keep + (1 - keep) / factor;
  }
}

// Peng et al., "YaRN" (2023), as in transformers' modeling_rope_utils.py. Returns the factor of cos
// and sin.
double scale_yarn(const Scaling& scaling, double theta, std::vector<double>& frequencies) {
  const double context = scaling.positive("original_max_position_embeddings");
  const double factor = scaling.positive("factor");
  const double half = static_cast<double>(frequencies.size());
  // The (fractional) channel that turns so often within the original context.
  const auto channel = [&](double turns) {
    return half * std::log(context / (turns * 2 * std::numbers::pi)) / std::log(theta);
  };
  double first = channel(scaling.find("beta_fast").value_or(32));
  double last = channel(scaling.find("beta_slow").value_or(1));
  if (scaling.find("truncate").value_or(1) != 0) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, 2 * half - 1);
  const double width = std::max(last - first, 0.001);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double slow = std::clamp((static_cast<double>(i) - first) / width, 0.0, 1.0);
    frequencies[i] *= 1 - slow + slow / factor;
  }
  const auto magnitude = [&](double scale) {
    return factor <= 1 ? 1.0 : 0.1 * scale * std::log(factor) + 1;
  };
  if (const auto given = scaling.find("attention_factor")) return *given;
  const double scale = scaling.find("mscale").value_or(0);
  const double scale_all = scaling.find("mscale_all_dim").value_or(0);
  if (scale != 0 && scale_all != 0) return magnitude(scale) / magnitude(scale_all);
  return magnitude(1);
}

}  // namespace

Rope::Rope(int head_dim, double theta, const std::string& scaling) {
  for (int i = 0; i < head_dim / 2; ++i) {
    frequencies_.push_back(std::pow(theta, -2.0 * i / head_dim));
  }
  if (scaling.empty()) return;
  const Scaling rule(scaling);
  if (rule.type() == "linear") {
    for (double& frequency : frequencies_) frequency /= rule.positive("factor");
  } else if (rule.type() == "factors") {
    const auto divisors = rule.divisors(frequencies_.size());
    for (size_t i = 0; i < divisors.size(); ++i) frequencies_[i] /= divisors[i];
  } else if (rule.type() == "llama3") {
    scale_llama3(rule, frequencies_);
  } else if (rule.type() == "yarn") {
    magnitude_ = scale_yarn(rule, theta, frequencies_);
  } else if (rule.type() != "default") {
    throw Error(
        "rope_scaling of type '{}' is not supported; there are linear, llama3, yarn and "
        "factors",
        rule.type());
  }
}

void Rope::turn(int64_t position, float* turn) const {
  const size_t half = frequencies_.size();
  for (size_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * frequencies_[i];
    turn[i] = static_cast<float>(magnitude_ * std::cos(angle));
    turn[half + i] = static_cast<float>(magnitude_ * std::sin(angle));
  }
}

void Rope::rotate(const float* turn, int heads, int head_dim, float* x) {
  const int half = head_dim / 2;
  const float* const cos = turn;
  const float* const sin = turn + half;
  for (int h = 0; h < heads; ++h, x += head_dim) {
    for (int i = 0; i < half; ++i) {
      const float low = x[i], high = x[half + i];
      x[i] = low * cos[i] - high * sin[i];
      x[half + i] = high * cos[i] + low * sin[i];
    }
  }
}

}  // namespace sikv
