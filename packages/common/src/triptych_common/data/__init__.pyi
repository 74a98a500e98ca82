from .contents import contents_of as contents_of
from .datasets import (
    DATASETS as DATASETS,
    ImageDataset as ImageDataset,
    in_memory as in_memory,
    load as load,
    open_source as open_source,
    report_unusable as report_unusable,
    write_unusable as write_unusable,
)
from .decoding import (
    ImageTooSmall as ImageTooSmall,
    UnreadableImage as UnreadableImage,
    center_crop as center_crop,
    decode as decode,
    to_tensor as to_tensor,
)
from .folder import ImageFolder as ImageFolder
from .hub import HubImages as HubImages
from .source import ImageSource as ImageSource
