from __future__ import annotations

import torch

from helpers.contract import DecoderContract
from semseg.nets.decoders.c1 import C1


class TestC1(DecoderContract):
    name = "c1"
    layouts = ("c1/512", "c1/2048")


class TestC1DeepSupervision(DecoderContract):
    name = "c1_deepsup"
    layouts = ("c1_deepsup/512", "c1_deepsup/2048")
    has_aux = True


@torch.no_grad()
def test_each_head_reads_one_map() -> None:
    decoder = C1((4, 8, 16, 32), 3, deep_supervision=True).train()
    maps = [torch.randn(2, channels, 4, 4) for channels in (4, 8, 16, 32)]
    main, aux = decoder(maps)
    deepest_changed = decoder([*maps[:3], torch.randn_like(maps[3])])
    assert torch.equal(deepest_changed.aux, aux) and not torch.equal(deepest_changed.main, main)
    last_but_one_changed = decoder([*maps[:2], torch.randn_like(maps[2]), maps[3]])
    assert torch.equal(last_but_one_changed.main, main) and not torch.equal(last_but_one_changed.aux, aux)
