"""Load a native checkpoint as people without vbp do, and leave its logits: started by its path, as a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str, images_file: str, logits_file: str) -> None:
    """Run the checkpoint in a folder over images.

    Args:
        folder: In the format of timm's or of Hugging Face's models.
        images_file: A tensor that torch saved.
        logits_file: Where the logits go.
    """
    sys.modules["vbp"] = None  # type: ignore[assignment]  # whatever asks for it fails
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    import torch

    if "architecture" in config:  # transformers has a list of `architectures`
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        from transformers import AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(folder)
    model = model.float().eval()
    images = torch.load(images_file, weights_only=True)
    with torch.inference_mode():
        outputs = [model(batch) for batch in images.split(32)]
    torch.save(torch.cat([getattr(output, "logits", output) for output in outputs]), logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
