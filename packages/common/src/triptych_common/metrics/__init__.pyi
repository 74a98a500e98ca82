from .adm import (
    AdmScores as AdmScores,
    FeatureSet as FeatureSet,
    ImageFeatures as ImageFeatures,
    adm_scores as adm_scores,
    image_features as image_features,
    inception_score as inception_score,
)
from .bootstrap import (
    Estimate as Estimate,
    as_share as as_share,
    bootstrap as bootstrap,
    bootstrap_rate as bootstrap_rate,
)
from .distances import (
    Gaussian as Gaussian,
    fit_gaussian as fit_gaussian,
    frechet_distance as frechet_distance,
    frechet_influence as frechet_influence,
    gaussian_frechet as gaussian_frechet,
    kernel_distance as kernel_distance,
)
from .inception import Inception as Inception, load_inception as load_inception
from .instruments import Instrument as Instrument, load_instrument as load_instrument
from .neighbours import (
    coverage as coverage,
    nearest_distances as nearest_distances,
    precision_recall as precision_recall,
)
from .npz import NpzImages as NpzImages
