"""Triton device code and launch plans: no torch, no autograd, no registration.

Symbols, per image: A the feature map, C channels by L = H*W positions; s channel weights (C);
t spatial weights (L); G a gradient with A's shape.  |A| is the size of A in bytes.

One launch for several passes; a read in brackets is meant to find A in L2 (see `bench/results/h100.md`):

| file                  | equation                                              | reads      | writes |
|-----------------------|-------------------------------------------------------|------------|--------|
| attention_forward     | A, s -> T and A pooled under T, or D                  | |A| (|A|)  | small  |
| attention_backward    | dT = v A, dU = norm'(dT), ds = A dU; for v and dz     | |A| (|A|)  | small  |
| features_grad         | dA = x t/L + s dU + dg/L, an outer-product sum        | 0 (|G|)    | |A|    |
| guidance              | beta, S, the guidance loss and its gradient           | small      | small  |
| schedule              | tickets, and counters that say what is finished       |            |        |
| plan                  | tiles, groups, and when to go pass by pass            |            |        |

Pass by pass, and what other poolings need:

| file                  | equation                                              | reads      | writes |
|-----------------------|-------------------------------------------------------|------------|--------|
| spatial_sum           | out_c = scale * sum_l t_l A_cl                        | |A|        | small  |
| channel_sum           | out_l = sum_c s_c A_cl, in fixed-order partial sums   | |A|        | small  |
| spatial_norm          | T = softmax / sum / sigmoid (U) over l; dT -> dU      | small      | small  |
| max_pool              | max_l t_l A_cl, where, and A there                    | |A|        | small  |
| position_scatter      | out_l = sum over c with index_c = l of x_c            | small      | small  |
| hadamard              | D_cl = A_cl * t_l (or A_cl * s_c)                     | |A|        | |D|    |
| grad_cam_means        | mean_l G t, sum_l G A, sum_c G A in one pass          | |A| + |G|  | small  |
"""
