"""Every metric against an independent implementation or a formula by hand, and on inputs with known values."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from univid_jax.core.errors import UserError
from univid_jax.core.options import DepthAlignment
from univid_jax.data.tasks.camera import camera_movement, camera_poses
from univid_jax.evaluation.metrics import camera
from univid_jax.evaluation.metrics.camera import camera_metrics, recover_pose, warp
from univid_jax.evaluation.metrics.clip_scores import CLIPScores
from univid_jax.evaluation.metrics.dense import (
  align_depth,
  confusion_matrix,
  depth_metrics,
  edge_counts,
  edge_metrics,
  match_edges,
  match_labels,
  nearest_labels,
  normal_metrics,
  saliency_metrics,
  segmentation_metrics,
)
from univid_jax.evaluation.metrics.image import psnr, rmse, ssim


def clip(seed, shape=(2, 24, 32, 3)):
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


class TestImages:
  def test_against_formulas(self):
    a, b = clip(0), clip(1)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-6)
    squares = [(int(x) - int(y)) ** 2 for x, y in zip(a.ravel(), b.ravel())]
    mean = sum(squares) / len(squares)
    assert rmse(a, b) == pytest.approx(math.sqrt(mean), rel=1e-9)
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / mean), rel=1e-9)

  def test_ssim_by_hand(self):
    """Wang's formula with his Gaussian window; borders of half a window do not count."""
    a, b = clip(0)[:1], clip(1)[:1]
    values = []
    for c in range(3):
      x, y = (p[0, ..., c].astype(np.float64) for p in (a, b))
      blur = lambda z: gaussian_filter(z, 1.5, truncate=3.5)  # noqa: E731
      mx, my = blur(x), blur(y)
      vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
      c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
      values.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))[5:-5, 5:-5].mean())
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-6)

  def test_known_values(self):
    a = clip(0)
    assert (rmse(a, a), psnr(a, a), ssim(a, a)) == (0, 100, pytest.approx(1))
    black, white = np.zeros_like(a), np.full_like(a, 255)
    assert rmse(black, white) == 255 and psnr(black, white) == 0
    with pytest.raises(ValueError, match="must have the same shape"):
      rmse(a, a[:1])
    with pytest.raises(ValueError, match="at least 11 pixels"):
      ssim(a[:, :8], a[:, :8])


class TestDepth:
  truth = np.array([[1.0, 2.0, 4.0], [0.0, np.nan, 8.0]])

  def test_by_hand(self):
    predicted = np.array([[1.1, 3.0, 4.0], [9.0, 9.0, 4.0]])
    found = depth_metrics(predicted, self.truth)
    p, t = [1.1, 3.0, 4.0, 4.0], [1.0, 2.0, 4.0, 8.0]
    logs = [math.log(a) - math.log(b) for a, b in zip(p, t)]
    expected = {
      "delta1": 2 / 4,
      "delta2": 3 / 4,
      "delta3": 3 / 4,
      "abs_rel": sum(abs(a - b) / b for a, b in zip(p, t)) / 4,
      "sq_rel": sum((a - b) ** 2 / b for a, b in zip(p, t)) / 4,
      "rmse_m": math.sqrt(sum((a - b) ** 2 for a, b in zip(p, t)) / 4),
      "rmse_log": math.sqrt(sum(x * x for x in logs) / 4),
      "silog": 100 * math.sqrt(sum(x * x for x in logs) / 4 - (sum(logs) / 4) ** 2),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
      assert found[name] == pytest.approx(value, rel=1e-6), name

  def test_alignment(self):
    relative = np.where(np.isfinite(self.truth), (self.truth - 3) / 5, 0.3)
    aligned = align_depth(relative, self.truth, how=DepthAlignment.LEAST_SQUARES)
    assert depth_metrics(aligned, self.truth)["rmse_m"] == pytest.approx(0, abs=1e-9)
    aligned = align_depth(self.truth / 7, self.truth, how=DepthAlignment.MEDIAN)
    assert depth_metrics(aligned, self.truth)["abs_rel"] == pytest.approx(0, abs=1e-9)
    assert np.array_equal(align_depth(relative, self.truth, how=DepthAlignment.NONE), relative)

  @pytest.mark.parametrize("how", [DepthAlignment.LEAST_SQUARES, DepthAlignment.MEDIAN])
  def test_alignment_looks_at_pixels_of_known_depth_alone(self, how):
    """What is predicted where the truth is 0, negative or not finite changes nothing elsewhere."""
    truth = np.array([1.0, 2.0, 4.0, 8.0, 0.0, 0.0, -1.0, np.nan])
    for rest in ([0.1] * 4, [50.0, 70.0, 90.0, 11.0]):
      aligned = align_depth(np.array([0.5, 1.0, 2.0, 4.0, *rest]), truth, how=how)
      np.testing.assert_allclose(aligned[:4], truth[:4])

  def test_known_values(self):
    same = depth_metrics(self.truth, self.truth)
    assert same["delta1"] == 1 and same["rmse_m"] == same["silog"] == 0
    assert depth_metrics(2 * self.truth, self.truth)["silog"] == pytest.approx(0, abs=1e-5)
    assert all(map(math.isnan, depth_metrics(self.truth, np.zeros((2, 3))).values()))
    assert depth_metrics(np.zeros((2, 3)), self.truth)["delta3"] == 0
    assert all(map(math.isfinite, depth_metrics(np.full((2, 3), np.nan), self.truth).values()))


class TestNormals:
  def test_by_hand(self):
    angles = np.radians([0.0, 4.0, 10.0, 20.0, 90.0])
    truth = np.tile([0.0, 0.0, 1.0], (5, 1))
    predicted = 3 * np.stack([np.sin(angles), 0 * angles, np.cos(angles)], axis=-1)
    found = normal_metrics(np.concatenate([predicted, [[1, 0, 0]]]), np.concatenate([truth, [[0, 0, 0]]]))
    assert found == pytest.approx({"mean": 24.8, "median": 10.0, "below_5": 0.4, "below_11.25": 0.6, "below_30": 0.8})
    assert normal_metrics(-truth, truth)["mean"] == pytest.approx(180)
    assert math.isnan(normal_metrics(truth, 0 * truth)["mean"])


class TestSegmentation:
  def test_against_sklearn(self, sklearn_metrics):
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (2, 30, 30))
    confusion = confusion_matrix(predicted, truth, 6)
    assert np.array_equal(confusion[:4, :4], sklearn_metrics.confusion_matrix(truth.ravel(), predicted.ravel()))
    jaccard = sklearn_metrics.jaccard_score(truth.ravel(), predicted.ravel(), average="macro")
    accuracy = sklearn_metrics.accuracy_score(truth.ravel(), predicted.ravel())
    assert segmentation_metrics(confusion) == pytest.approx({"miou": jaccard, "pixel_accuracy": accuracy}, abs=1e-6)
    known = truth != 2
    expected = sklearn_metrics.jaccard_score(truth[known], predicted[known], average="macro", labels=[0, 1, 3])
    found = segmentation_metrics(confusion_matrix(predicted, truth, 6, void=2), void=2)
    assert found["miou"] == pytest.approx(expected, abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(np.mean(truth[known] == predicted[known]))

  def test_data_set_is_not_the_mean_of_its_images(self, sklearn_metrics):
    """Intersections and unions are summed before they are divided, as in benchmarks."""
    rng = np.random.default_rng(3)
    truth, predicted = rng.integers(0, 3, (2, 4, 10, 10))
    predicted[0] = truth[0]
    total = sum(confusion_matrix(p, t, 3) for p, t in zip(predicted, truth))
    jaccard = sklearn_metrics.jaccard_score(truth.ravel(), predicted.ravel(), average="macro")
    assert segmentation_metrics(total)["miou"] == pytest.approx(jaccard, abs=1e-6)

  def test_permuted_labels(self):
    truth = np.random.default_rng(1).integers(0, 5, (40, 40))
    permuted = np.array([3, 0, 4, 1, 2])[truth]
    confusion = confusion_matrix(permuted, truth, 5)
    assert segmentation_metrics(confusion)["pixel_accuracy"] == 0
    assert segmentation_metrics(match_labels(confusion)) == {"miou": 1.0, "pixel_accuracy": 1.0}
    best = max(np.mean(np.array(order)[permuted // 2] == truth // 2) for order in itertools.permutations(range(3)))
    matched = match_labels(confusion_matrix(permuted // 2, truth // 2, 3))
    assert segmentation_metrics(matched)["pixel_accuracy"] == pytest.approx(best)

  def test_known_values(self):
    one = np.zeros((4, 4), int)
    assert segmentation_metrics(confusion_matrix(one, one, 3)) == {"miou": 1.0, "pixel_accuracy": 1.0}
    assert segmentation_metrics(confusion_matrix(one + 1, one, 3)) == {"miou": 0.0, "pixel_accuracy": 0.0}
    assert math.isnan(segmentation_metrics(confusion_matrix(one, one, 3, void=0), void=0)["miou"])

  def test_nearest_labels(self):
    palette = [(0, 0, 0), (250, 0, 0), (0, 0, 250)]
    image = np.array([[[9, 3, 0], [240, 20, 9]], [[10, 2, 200], [0, 0, 0]]], np.uint8)
    assert nearest_labels(image, palette).tolist() == [[0, 1], [2, 0]]


class TestSaliency:
  def test_by_hand(self, sklearn_metrics):
    truth = np.zeros((4, 4))
    truth[:2] = 1
    predicted = np.zeros((4, 4))
    predicted[1:, :2] = 0.8
    precision, recall = 2 / 6, 2 / 8
    found = saliency_metrics(predicted, truth)
    assert found["iou"] == pytest.approx(2 / 12)
    assert found["f_measure"] == pytest.approx(1.3 * precision * recall / (0.3 * precision + recall))
    fbeta = sklearn_metrics.fbeta_score(truth.ravel() > 0, predicted.ravel() > 0.5, beta=0.3**0.5)
    assert found["f_measure"] == pytest.approx(fbeta)
    assert found["mae"] == pytest.approx(np.abs(predicted - truth).mean())

  def test_known_values(self):
    empty, full = np.zeros((3, 3)), np.ones((3, 3))
    assert saliency_metrics(full, full) == saliency_metrics(empty, empty) == {"iou": 1.0, "f_measure": 1.0, "mae": 0.0}
    assert (
      saliency_metrics(1 - full, full) == saliency_metrics(full, empty) == {"iou": 0.0, "f_measure": 0.0, "mae": 1.0}
    )
    assert saliency_metrics(full / 2, full)["iou"] == saliency_metrics(full, full / 2)["iou"] == 1


def most_pairs(a, b, tolerance):
  """Finds the largest matching by trying everything."""
  if not len(a):
    return 0
  rest = most_pairs(a[1:], b, tolerance)
  return max(
    [rest]
    + [
      1 + most_pairs(a[1:], b[:j] + b[j + 1 :], tolerance) for j in range(len(b)) if math.dist(a[0], b[j]) <= tolerance
    ]
  )


class TestEdges:
  @pytest.mark.parametrize("seed", range(8))
  @pytest.mark.parametrize("tolerance", [1.0, 1.5])
  def test_matching_is_the_largest(self, seed, tolerance):
    a, b = np.random.default_rng(seed).random((2, 4, 5)) < 0.35
    expected = most_pairs(np.argwhere(a).tolist(), np.argwhere(b).tolist(), tolerance)
    assert match_edges(a, b, tolerance=tolerance) == expected

  def test_within_one_pixel(self):
    line = np.zeros((12, 12), bool)
    line[5, 2:10] = True
    assert match_edges(np.roll(line, 1, axis=0), line) == 8 and match_edges(np.roll(line, 2, axis=0), line) == 0
    assert match_edges(~line & False, line) == 0

  def test_a_threshold_is_reached(self):
    """As in the Berkeley benchmark: of 1/4, 1/2 and 3/4 a strength of 1/2 is found at the first two."""
    truth = np.zeros((16, 16), bool)
    truth[5, 2:14] = True
    assert edge_counts(truth * 0.5, truth, thresholds=3).tolist() == [[12, 12, 12], [12, 12, 12], [0, 0, 12]]

  def test_scores_by_hand(self):
    truth = np.zeros((2, 16, 16), bool)
    truth[0, 5, 2:14], truth[1, 2:14, 7] = True, True
    strength = truth * np.array([0.9, 0.4])[:, None, None]
    strength[0, 12, 2:8], strength[1, 13:15, 2] = 0.5, 0.2
    counts = [edge_counts(s, t, thresholds=19) for s, t in zip(strength, truth)]
    # Thresholds below 0.2 keep everything; to 0.4, all but the false line of the second image; to 0.5; to 0.9.
    matched, predicted, true = np.array([24, 24, 12, 12]), np.array([12 + 6 + 12 + 2, 30, 18, 12]), 24
    f = 2 * matched / (predicted + true)
    best = 2 * 24 / (12 + 12 + 24)
    found = edge_metrics(counts)
    assert found["ods"] == pytest.approx(f.max(), abs=1e-6) and found["ois"] == pytest.approx(best, abs=1e-6)
    # Precision at the lowest threshold of each recall; above 0.9 nothing is found, at precision 0.
    area = np.interp(np.linspace(0, 1, 101), [0, 12 / 24, 24 / 24], [0, 12 / 18, 24 / 32]).sum() / 100
    assert found["ap"] == pytest.approx(area, abs=1e-6)

  def test_known_values(self):
    truth = np.zeros((10, 10), bool)
    truth[4, 1:9] = True
    perfect = edge_metrics([edge_counts(truth.astype(float), truth)])
    expected = pytest.approx({"ods": 1, "ois": 1, "ap": math.nan}, nan_ok=True)
    assert perfect == expected, "precision is known at one recall alone"
    gradual = truth * np.linspace(0.3, 0.95, 10)  # recalls from 1/8 to 1 with precision 1, and 0 with precision 0
    area = sum(min(recall / 12.5, 1) for recall in range(101)) / 100
    assert edge_metrics([edge_counts(gradual, truth)])["ap"] == pytest.approx(area, abs=1e-6)
    assert edge_metrics([edge_counts(np.zeros((10, 10)), truth)])["ods"] == 0
    assert math.isnan(edge_metrics([])["ods"])
    # Half of the edges at precision 1, all at 1/2: no precision is known of fewer.
    found = edge_metrics([np.array([[5, 5, 10], [10, 20, 10]])])
    assert found["ap"] == pytest.approx(np.linspace(1, 0.5, 51).sum() / 100, abs=1e-6)


class TestCamera:
  photo = np.asarray(Image.fromarray(data.astronaut()).resize((96, 80)))

  @pytest.mark.parametrize("pose", [(0.2, 0.1, 0.05, -0.03), (0.35, -0.2, -0.06, 0.04), (0.0, 0.0, 0.0, 0.0)])
  def test_known_pose_is_recovered(self, pose):
    seen = np.clip(np.round(warp(self.photo.astype(float), np.array(pose))), 0, 255).astype(np.uint8)
    assert np.abs(recover_pose(seen, self.photo) - pose).max() < 0.01

  def test_errors_of_a_pose_by_hand(self, monkeypatch):
    """The zoom is 20 % too large, the angle 3 degrees; the shift is off by 6 of 40 columns and 8 of 30 rows."""
    found = np.array([np.log(1.5 * 1.2), np.radians(10 + 3), 0.05 + 6 / 40, -0.02 - 8 / 30])
    monkeypatch.setattr(camera, "recover_pose", lambda *_, **__: found)
    clip = np.zeros((2, 30, 40, 3), np.uint8)
    errors = camera_metrics(clip, clip[:1], [np.zeros(4), np.array([np.log(1.5), np.radians(10), 0.05, -0.02])])
    assert errors["zoom_error"] == pytest.approx(20) and errors["angle_error"] == pytest.approx(3)
    assert errors["shift_error"] == pytest.approx(100 * 10 / 50)

  @pytest.mark.parametrize("length", [1, 4])
  def test_a_frame_is_compared_with_that_of_the_same_time(self, monkeypatch, length):
    """Of a source that is an image with this; the camera stands still."""
    source = clip(0, (length, 12, 16, 3))
    monkeypatch.setattr(camera, "recover_pose", lambda *_, **__: np.zeros(4))
    predicted = source if length > 1 else source.repeat(4, axis=0)
    assert camera_metrics(predicted, source, np.zeros((4, 4)))["warped_psnr"] == 100

  def test_camera_task_follows_its_poses(self):
    params = {"zoom": 1.5, "angle": 12.0, "shift": [0.8, -0.5]}
    moved = (camera_movement(self.photo[None] / np.float32(255), **params, num_frames=5) * 255 + 0.5).astype(np.uint8)
    poses = camera_poses(5, (80, 96), **params)
    found = camera_metrics(moved, self.photo[None], poses)
    assert (
      found["zoom_error"] < 1
      and found["angle_error"] < 0.5
      and found["shift_error"] < 0.5
      and found["warped_psnr"] > 30
    )
    still = camera_metrics(np.repeat(self.photo[None], 5, 0), self.photo[None], poses)
    assert still["zoom_error"] > 10 and still["angle_error"] > 5 and still["warped_psnr"] > 30


def test_clips_are_compared_by_all_their_frames(monkeypatch):
  """Embeddings (1, 0) and (0, 1) have their mean between them, and (0, 1) is 45 degrees from it."""
  monkeypatch.setattr(CLIPScores, "_embed_frames", lambda _, clip: clip)
  scores, mixed, one = object.__new__(CLIPScores), np.eye(2), np.array([[0.0, 1.0], [0.0, 1.0]])
  assert scores.clip_i(mixed, one) == scores.clip_i(one, mixed) == pytest.approx(math.sqrt(0.5))


def test_clip_scores(tmp_path):
  """Similarities equal those of CLIP's own forward pass, with random weights."""
  torch = pytest.importorskip("torch", reason="needs the extra `clip`")
  transformers = pytest.importorskip("transformers", reason="needs the extra `clip`")
  with pytest.raises(UserError, match=r"transformers cannot load .*nowhere as a CLIP model: "):
    CLIPScores(str(tmp_path / "nowhere"))
  torch.manual_seed(0)
  config = transformers.CLIPConfig(
    text_config=dict(
      vocab_size=64,
      hidden_size=16,
      intermediate_size=16,
      num_hidden_layers=1,
      num_attention_heads=2,
      eos_token_id=2,
      bos_token_id=1,
      pad_token_id=0,
    ),
    vision_config=dict(
      hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    ),
    projection_dim=8,
  )
  model = transformers.CLIPModel(config).eval()
  model.save_pretrained(tmp_path)
  (tmp_path / "vocab.json").write_text('{"<|startoftext|>": 1, "<|endoftext|>": 2, "a</w>": 3, "a": 4}')
  (tmp_path / "merges.txt").write_text("#version: 0.2\n")
  tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
  processor = transformers.CLIPProcessor(
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokenizer
  )
  processor.save_pretrained(tmp_path)
  scores, frames, other = CLIPScores(str(tmp_path)), clip(0), clip(5)
  assert scores.clip_i(frames, frames) == pytest.approx(1, abs=1e-6) and -1 <= scores.clip_i(frames, other) < 1
  with torch.no_grad():
    inputs = processor(text=["a"], images=list(frames), return_tensors="pt", padding=True)
    logits = model(**inputs).logits_per_image / model.logit_scale.exp()
  assert scores.clip_t(frames, "a") == pytest.approx(100 * float(logits.mean()), abs=1e-3)
