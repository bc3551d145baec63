"""The one table of tolerances: relative Frobenius error against fp64 on the same inputs. The same everywhere."""

# Kernel against reference of the optimizer step: the same fp32 operations in the same order, without fused multiply-add.
STEP_BITWISE = 0.0
# 50 steps in fp32 against fp64: rounding of p, m and h adds up, and a coordinate at the clipping threshold may fall either way.
STEP_50_FP32 = 2e-6
# One step with bf16 or fp16 parameters against fp64: half a unit in the last place, 2^-9 and 2^-12, at most.
STEP_ONE_BF16 = 2e-3
STEP_ONE_FP16 = 2.5e-4
# log p of one token, absolute: fp32 logits of |z| <= 30 carry 2e-6 each, exp2.approx adds as much.
LOGP_ABS = 2e-5
# 1 - p(label), relative, down to 1e-10: one rounded subtraction z - max of size 25 costs 2e-6 in the exponent.
ONE_MINUS_P = 1e-4
# dX and dW from fp32 inputs: GEMMs of some hundred terms.
GRAD_FP32 = 1e-5
# dX from bf16 inputs: its own rounding is 1.7e-3, and dlogits are rounded once before.
GRAD_BF16 = 4e-3
# dW from bf16 inputs is rounded to bf16 at the end as well; accumulated in fp32 before.
GRAD_BF16_WEIGHT = 4e-3
# Gradients of objectives whose logits are of size 30: the rounding of z, 2e-6, is in every e^z.
GRAD_OBJECTIVE = 2e-5
# Worst row of dW where it is a difference p - q of a model and its reference: of some entries little is left.
WORST_ROW_KL = 1e-3
# Worst single row of dX or dW: rows of small norm see cancellation.
WORST_ROW_FP32 = 1e-4
WORST_ROW_BF16 = 1e-2
