"""Metrics of classification and regression, scikit-learn's and scipy's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def classification_metrics(labels: Sequence[int], predicted: Sequence[int], num_classes: int) -> dict[str, float]:
    """Accuracy, F1 (of class 1 of two, else the mean over classes) and Matthews' correlation."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef  # here, because they take time to import

    average = "binary" if num_classes == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0.0)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def regression_metrics(values: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, 0 where one side is constant, and the root of the mean squared error."""
    from scipy.stats import pearsonr, spearmanr

    is_constant = len(values) < 2 or len(set(values)) == 1 or len(set(predicted)) == 1
    error = np.asarray(values) - np.asarray(predicted)
    return {
        "pearson": 0.0 if is_constant else float(pearsonr(values, predicted)[0]),
        "spearman": 0.0 if is_constant else float(spearmanr(values, predicted)[0]),
        "rmse": math.sqrt(float(np.mean(error**2))),
    }
