import pytest
import torch
from torch import nn

from quadstep import LQA
from quadstep.calls import Call, argument, link, mark

MASK = torch.arange(10).reshape(2, 5) % 3 != 0
KEY = object()

COPIES = {
    "next tokens": lambda out: out[:, :-1].reshape(-1, 6),
    "next tokens, contiguous": lambda out: out[..., :-1, :].contiguous().view(-1, 6),
    "last token": lambda out: out[:, -1].contiguous(),
    "every other": lambda out: out[:, 1::2].reshape(-1),
    "pixels": lambda out: out.permute(0, 2, 1).reshape(-1, 5),
    "permuted": lambda out: out.permute(2, 0, 1).contiguous(),
    "transposed": lambda out: out.transpose(-1, 1).contiguous(),
    "flattened": lambda out: out.transpose(1, 2).flatten(1),
    "mask": lambda out: out[MASK],
    "list": lambda out: out[:, [0, 2]],
    "list of columns": lambda out: out[..., [5, 0]].squeeze(),
    "selected": lambda out: out.index_select(1, torch.tensor([0, 2, 2])),
    "cast": lambda out: out.double(),
    "cast and reshaped": lambda out: out[:, :-1].reshape(-1, 6).double(),
    "chunk": lambda out: out.chunk(2, 1)[1].contiguous(),
    "unbound": lambda out: out.unbind(1)[3].contiguous(),
    "expanded": lambda out: out.unsqueeze(1).expand(2, 3, 5, 6).contiguous(),
    "clone": lambda out: out.clone(),
    "matrix": lambda out: out[0].T.contiguous()[1:],
}
VIEWS = {
    "itself": lambda out: out,
    "slice": lambda out: out[:, 1:-1, ::2],
    "pixel": lambda out: out.permute(0, 2, 1),
    "row": lambda out: out[0].T,
}
OTHERS = {
    "scaled": lambda out: 2.0 * out,
    "normalized": lambda out: nn.functional.normalize(out, dim=-1),
    "in place": lambda out: out.clone().relu_(),
    "in place after a view": lambda out: out[:, 1:].contiguous().view(-1).mul_(3.0),
    "two": lambda out: torch.cat([out, out]),
    "mean": lambda out: out.mean(1),
    "summed index": lambda out: out[MASK].sum(0),
}


@pytest.mark.parametrize("name", COPIES | VIEWS)
def test_what_is_taken_is_repeated(name):
    take = (COPIES | VIEWS)[name]
    weight = torch.randn(2, 5, 6, requires_grad=True)
    call, output = Call(torch.tanh, torch.tanh), torch.tanh(weight)
    mark(output, call, 0, KEY)
    found = link(take(output), KEY)
    assert found is not None
    again = torch.randn(2, 5, 6)
    assert torch.equal(argument(found, {call: [again]}), take(again))


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_is_not(name):
    weight = torch.randn(2, 5, 6, requires_grad=True)
    call, output = Call(torch.tanh, torch.tanh), torch.tanh(weight)
    mark(output, call, 0, KEY)
    assert link(OTHERS[name](output), KEY) is None


def test_language_models():
    """The loop that they are trained in: the next token of each but the last."""
    ends = []
    for recorded in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 16), nn.Dropout(0.1), nn.Linear(16, 7))
        criterion = nn.CrossEntropyLoss()
        opt = LQA(
            model.parameters(), **({"model": model, "criterion": criterion} if recorded else {})
        )
        tokens = torch.randint(7, (20, 8, 9), generator=torch.Generator().manual_seed(0))
        for batch in tokens:

            def loss(model=model, criterion=criterion, batch=batch):
                logits = model(batch)
                return criterion(logits[:, :-1].reshape(-1, 7), batch[:, 1:].reshape(-1))

            if recorded:
                opt.zero_grad()
                loss().backward()
                opt.step()
            else:
                opt.step(loss)
        ends.append([*model.parameters(), torch.tensor(opt.rate)])
    assert all(map(torch.equal, *ends))
