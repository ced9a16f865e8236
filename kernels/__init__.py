"""Triton device code and launch plans: no torch, no autograd, no registration.

Symbols, per image: A the feature map, C channels by L = H*W positions; s channel weights (C);
t spatial weights (L); G a gradient with A's shape.  |A| is the size of A in bytes.

| file             | equation                                                    | reads     | writes |
|------------------|-------------------------------------------------------------|-----------|--------|
| spatial_sum      | out_c = scale * sum_l t_l A_cl, for no, one or two t        | |A|       | small  |
| channel_sum      | out_l = sum_c s_c A_cl in fixed-order parts, one or two s   | |A|       | small  |
| spatial_norm     | T = softmax / sum / sigmoid (U) over l; dT -> dU            | small     | small  |
| product          | a linear layer and its backward                             | small     | small  |
| layer_grads      | the gradients of up to four layers' weights and biases      | small     | small  |
| tf32             | x w in float32 on tensor cores, for the two above           |           |        |
| arrival          | sums over the programs of a launch, by the last to arrive   |           |        |
| batch_norm       | act(batch norm x), running values, and its backward         | small     | small  |
| softmax          | S = softmax (e) over channels, and its backward             | small     | small  |
| cross_entropy    | per image and mean, its gradient, the class score's         | small     | small  |
| guidance         | beta, S, the guidance loss and its gradient, the whole loss | small     | small  |
| position_guidance| a target q of T, KL(q, T), and dU with q's part             | small     | small  |
| features_grad    | dA = x t/L + s dU + dg/L, an outer-product sum              | 0 (|G|)   | |A|    |
| max_pool         | argmax_l t_l A_cl, and A at that position                   | |A|       | small  |
| position_scatter | out_l = sum over c with index_c = l of x_c                  | small     | small  |
| hadamard         | D_cl = A_cl * t_l (or A_cl * s_c)                           | |A|       | |D|    |
| grad_cam_means   | mean_l G t, sum_l G A, sum_c G A in one pass                | |A| + |G| | small  |
| plan             | tiles, by measurement                                       |           |        |

With guidance of positions, position_guidance takes the place of the gradients' spatial_norm.  A step then has
no launch and no read of A more.

A guided step with average pooling and the default classifier has 27 launches:

    forward     spatial_sum (the mean), product, product, softmax, channel_sum, spatial_norm,      3 |A| read
                spatial_sum, batch_norm, product, batch_norm, product, cross_entropy
    gradients   product, batch_norm, product, batch_norm, channel_sum, spatial_norm, spatial_sum,  2 |A| read
                for beta and dA together; softmax, product, product, for beta alone;
                guidance with the whole loss; product, product
    backward    features_grad, layer_grads                                                         |A| written

The first 25 run when the loss is computed: the gradient that arrives at the loss only scales the results.

Separate passes were faster on an H100 than one persistent launch whose second read finds A in the L2 cache.
They were also faster than tiles held in shared memory, which read A once (`dev/h100.md`).
"""
