#include "codecs/sign_vq/sign_vq_launch.cuh"

template struct sikv::cuda::SignVqLaunches<96>;
