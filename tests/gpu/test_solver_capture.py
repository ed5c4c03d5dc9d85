"""One captured solver step serves the whole run: the host moves nothing but a step index."""

import pytest
import torch

from wantrt.schedulers.grids import SOLVERS, make_grid
from wantrt.schedulers.solver import Solver
from wantrt.schedulers.tables import make_table

SHAPE = (1, 16, 3, 5, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SOLVERS)
def test_replayed_step_equals_eager_steps(name):
    grid = make_grid(name, "official", 8, 5.0)
    table = make_table(name, grid.sigmas)
    noise = torch.randn(SHAPE, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    eager, captured = Solver(table, SHAPE, "cuda"), Solver(table, SHAPE, "cuda")
    index = torch.zeros(1, dtype=torch.int64, device="cuda")

    graph = torch.cuda.CUDAGraph()
    captured.step(torch.tanh(captured.sample), index)  # loads the kernels before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured.step(torch.tanh(captured.sample), index)

    eager.reset(noise)
    captured.reset(noise)
    for i in range(len(table)):
        eager.step(torch.tanh(eager.sample), i)
        index.fill_(i)
        graph.replay()
    assert torch.equal(eager.sample, captured.sample)
