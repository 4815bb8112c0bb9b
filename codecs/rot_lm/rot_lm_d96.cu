#include "codecs/rot_lm/rot_lm_launch.cuh"

template struct sikv::cuda::RotLmLaunches<96>;
