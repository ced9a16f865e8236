"""A function that cannot be compiled runs eagerly."""

import torch

from ggam_fast.training.system.compiling import compile_or_eager


def test_what_cannot_be_compiled_runs_eagerly_and_says_so(monkeypatch, caplog):
    def no_compiler(function, **options):
        def compiled(*arguments):
            module(torch.ones(2, 3))  # changes the statistics of batch norm
            raise RuntimeError("\nNo working C++ compiler found\nand a long story")

        return compiled

    module = torch.nn.BatchNorm1d(3)
    monkeypatch.setattr(torch, "compile", no_compiler)
    step = compile_or_eager(module, module, lambda f: f(torch.ones(2, 3)))
    assert step is module
    assert caplog.messages == ["running eagerly because torch.compile failed: No working C++ compiler found"]
    assert module.num_batches_tracked == 0
    assert module.running_mean.eq(0).all()
