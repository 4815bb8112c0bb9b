#include "kernels/common/kernel_bench.h"

int main(int argc, char** argv) {
  sikv::bench::Config config;
  config.kernel = "dense_attention";
  config.pipelines = {"fp16+fp16"};
  config.budget = 0;
  return sikv::bench::run(config, argc, argv);
}
