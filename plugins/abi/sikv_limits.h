/* What numbers may cross the plugin boundary. Usable from C11, C++ and CUDA device code. */
#ifndef SIKV_PLUGINS_ABI_SIKV_LIMITS_H_
#define SIKV_PLUGINS_ABI_SIKV_LIMITS_H_

/* The largest element of K, V and Q, 2^58: up to it the sum of 256 squared differences stays below
 * fp32's largest, so what is no larger never becomes inf or NaN later on. fp32 and bf16 hold numbers
 * whose squares they cannot. */
#define SIKV_LARGEST_ELEMENT 288230376151711744.0f

#endif /* SIKV_PLUGINS_ABI_SIKV_LIMITS_H_ */
