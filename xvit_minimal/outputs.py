"""What a model in evaluation mode says to the pictures of a set, in batches, by one process or
several."""

import torch

from .distributed import rank, world
from .images import normalize


@torch.no_grad()
def outputs(model, images, amp, batch_size, as_list=False):
    """(index, output) of a model in evaluation mode for this process's part of an ImageSet, batch
    by batch.

    A detector takes its pictures `as_list`, each of its own size; another model in one tensor, with
    their sizes.
    """
    model.eval()
    device = next(model.parameters()).device
    for index in torch.arange(rank(), len(images), world()).split(batch_size):
        x = normalize(images.images[index].to(device))  # (B, 3, H, W)
        own = [picture_size(images, i) for i in index.tolist()]
        if as_list:
            inputs = ([picture[:, :height, :width] for picture, (height, width) in zip(x, own)],)
        else:
            inputs = (x, *own_sizes(torch.tensor(own), x))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output = model(*inputs)
        yield index, output


def picture_size(images, i):
    """(height, width) of a picture of an ImageSet without its padding."""
    return images.images.shape[-2:] if images.sizes is None else images.sizes[i].tolist()


def own_sizes(sizes, x):
    """(sizes,) to give to a model after the images x (B, 3, H, W), or () if all of them fill x."""
    return (sizes.to(x.device),) if (sizes < torch.tensor(x.shape[-2:])).any() else ()
