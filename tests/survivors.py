"""Mutants that no test can notice, and why: for each file, the lines before and after the change.

A line that occurs several times in a file is numbered from the second on.

`python -m tests.mutants` does not run these.  A row that is no mutant any more fails tests/test_mutants.py.
"""

# ruff: noqa: E501 (lines of code stand as they are)

SURVIVORS: dict[str, dict[tuple[str, str], str]] = {
    "ggam_fast/autograd.py": {
        (
            "return x.clone()",
            "return x",
        ): "Autograd makes a view of an input that a Function returns, and nothing writes to either.",
    },
    "ggam_fast/backends/torch.py": {
        (
            "return aten._softmax_backward_data(ds, s, -1, ds.dtype)",
            "return aten._softmax_backward_data(ds, s, 1, ds.dtype)",
        ): "S has two dimensions.",
        (
            "return guard_or_false(x.shape[0] == 1)",
            "return guard_or_false(x.shape[0] != 1)",
        ): "It chooses between two forms with the same numbers, of which one is faster.",
        (
            "return as_type(da.transpose(1, 2) if channels_last else da, features.dtype)",
            "return as_type(da.transpose(2, 1) if channels_last else da, features.dtype)",
        ): "The same two dimensions are exchanged.",
        (
            "counts = share if mean else (share > 0).to(share.dtype)",
            "counts = share if mean else share > 0",
        ): "Its product with a float is the same for 1 and True.",
    },
    "ggam_fast/classifier/rules.py": {
        (
            "slope = torch.ones_like(x[:1]) if gamma is None else gamma",
            "slope = torch.ones_like(x[:2]) if gamma is None else gamma",
        ): "x has no rows.",
    },
    "ggam_fast/closed_form.py": {
        (
            "t, weights, total = logits.new_ones((batch, positions)), logits.new_empty(0), logits.new_empty(0)",
            "t, weights, total = logits.new_ones((batch, positions)), logits.new_empty(1), logits.new_empty(0)",
        ): "Nothing reads what stands for no weights.",
        (
            "t, weights, total = logits.new_ones((batch, positions)), logits.new_empty(0), logits.new_empty(0)",
            "t, weights, total = logits.new_ones((batch, positions)), logits.new_empty(0), logits.new_empty(1)",
        ): "Nothing reads what stands for no total.",
    },
    "ggam_fast/guidance.py": {
        (
            "loss, g = weighted.sum(-1), weighted + s",
            "loss, g = weighted.sum(-1), weighted - s",
        ): "S sums to one, so a multiple of S in g cancels in g - S sum g.",
    },
    "ggam_fast/training/measure/geometry.py": {
        (
            "xy = _moved(points, image, transform).float()",
            "xy = _moved(points, image, transform)",
        ): "Annotations are float32 already.",
    },
    "kernels/batch_norm.py": {
        (
            "while start < N:",
            "while start <= N:",
        ): "In the last pass everything is masked.",
        (
            "while start < N: [2]",
            "while start <= N:",
        ): "In the last pass everything is masked.",
        (
            "factor = tl.maximum(factor, momentum)",
            "factor = tl.maximum(momentum, factor)",
        ): "It is the maximum of the same two numbers.",
        (
            "mean = tl.load(running_mean_ptr + c, mask=c < C, other=0.0)",
            "mean = tl.load(running_mean_ptr + c, mask=c < C, other=1.0)",
        ): "Columns past C are not stored.",
    },
    "kernels/cross_entropy.py": {
        (
            "while start < N:",
            "while start <= N:",
        ): "In the last pass everything is masked.",
        (
            "if K > BLOCK_K: [3]",
            "if K >= BLOCK_K:",
        ): "With K = BLOCK_K the same values are loaded again.",
        (
            "total += weight * tl.load(guidance_ptr).to(tl.float32)",
            "total += weight * tl.load(guidance_ptr)",
        ): "The sum with a float32 is a float32 of the same value.",
    },
    "kernels/features_grad.py": {
        (
            "k = tl.load(grad_mean_ptr + n * C + c, mask=c < C, other=0.0) / L",
            "k = tl.load(grad_mean_ptr + n * C + c, mask=c < C, other=1.0) / L",
        ): "Channels past C are not stored.",
    },
    "kernels/guidance.py": {
        (
            "flat = high - low <= tl.maximum(tl.abs(high), tl.abs(low)) * FLAT",
            "flat = high - low <= tl.maximum(tl.abs(low), tl.abs(high)) * FLAT",
        ): "It is the maximum of the same two numbers.",
    },
    "kernels/layer_grads.py": {
        (
            "dy_ptr + j[:, None] + n[None, :] * J, mask=(j < J)[:, None] & (n < N)[None, :], other=0.0",
            "dy_ptr + j[:, None] + n[None, :] * J, mask=(j < J)[:, None] & (n < N)[None, :], other=1.0",
        ): "x is 0 there, and rows past J are not stored.",
        (
            "acc *= tl.load(scale_ptr).to(tl.float32)",
            "acc *= tl.load(scale_ptr)",
        ): "The product with a float32 is a float32 of the same value.",
    },
    "kernels/spatial_norm.py": {
        (
            "BLOCK_P: tl.constexpr = max(1, min(32, 2048 // BLOCK_L))",
            "BLOCK_P: tl.constexpr = max(2, min(32, 2048 // BLOCK_L))",
        ): "The parts are summed in another order.",
        (
            "t = tl.load(attention_ptr + l, mask=l < L, other=0.0) [4]",
            "t = tl.load(attention_ptr + l, mask=l < L, other=1.0)",
        ): "Positions past L are not stored.",
    },
}
