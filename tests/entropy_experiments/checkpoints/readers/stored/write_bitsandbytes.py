"""Writes the stored states of bitsandbytes beside this file; needs bitsandbytes, which the tests do not.

Written with 0.50.2 on a CPU.

`expected` of each file holds the moments as bitsandbytes itself dequantises them.
"""

from pathlib import Path

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch

HERE = Path(__file__).parent


def main() -> None:
    for name, optimizer_class in (
        ("adamw_8bit", bnb.optim.AdamW8bit),
        ("adamw_paged_32bit", bnb.optim.PagedAdamW32bit),
        ("lion_8bit", bnb.optim.Lion8bit),
    ):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((30, 33), (8,), (70, 70))]
        kinds = {} if "32" in name else {"min_8bit_size": 512}
        optimizer = optimizer_class(
            [{"params": parameters[:2], "weight_decay": 0.01}, {"params": parameters[2:]}], lr=1e-2, **kinds
        )
        for _ in range(5):
            for p in parameters:
                p.grad = torch.randn_like(p) * torch.rand_like(p) ** 4
            optimizer.step()
        state = optimizer.state_dict()
        expected = {}
        for number, entry in enumerate(optimizer.state[p] for p in parameters):
            for moment in ("1", "2") if "state2" in entry else ("1",):
                value = entry[f"state{moment}"]
                if value.dtype == torch.uint8:
                    value = F.dequantize_blockwise(
                        value, absmax=entry[f"absmax{moment}"], code=entry[f"qmap{moment}"], blocksize=256
                    )
                expected[f"{number}/{moment}"] = value.clone()
        torch.save(state, HERE / f"{name}.pt")
        if name == "adamw_8bit":
            torch.save(expected, HERE / f"{name}_expected.pt")
        print(name, {k: (v.dtype, v.shape) for k, v in optimizer.state[parameters[2]].items() if torch.is_tensor(v)})


if __name__ == "__main__":
    main()
