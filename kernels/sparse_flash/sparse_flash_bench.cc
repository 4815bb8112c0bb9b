#include "kernels/common/kernel_bench.h"

int main(int argc, char** argv) {
  sikv::bench::Config config;
  config.kernel = "sparse_flash";
  config.pipelines = {"sign_vq+intq", "rot_lm+rot_lm"};
  return sikv::bench::run(config, argc, argv);
}
