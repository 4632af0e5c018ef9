"""One picture gives the same pixels however it is saved; depth and channels are kept."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_datasets import config

from simclr_jax.data import datasets, decode
from simclr_jax.data.sources import folder
from simclr_jax.images import to_array
from simclr_jax.process import UserError

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

H, W = 24, 32
SMOOTH = np.stack([np.add.outer(5 * np.arange(H), k * np.arange(W)) % 200 + 20 for k in (1, 2, 3)], -1)
PICTURE = SMOOTH.astype(np.uint8)
GREY = PICTURE[..., :1]
DEEP = np.random.default_rng(0).integers(0, 4096, (H, W, 5)).astype(np.uint16)


def tiff(pixels, **options):
    stream = io.BytesIO()
    is_rgb, is_contiguous = pixels.shape[-1] in (3, 4), pixels.shape[-1] in (3, 4, 5)
    options = {"photometric": "rgb" if is_rgb else "minisblack"} | options
    options = {"planarconfig": "contig" if is_contiguous else None} | options
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


def npy(pixels):
    stream = io.BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


def pillow(kind, image=None, **options):
    stream = io.BytesIO()
    (image or Image.fromarray(PICTURE)).save(stream, kind, **options)
    return stream.getvalue()


def dicom(pixels, **attributes):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = (
        ExplicitVRLittleEndian,
        SecondaryCaptureImageStorage,
    )
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = (
        1,
        "MONOCHROME2",
        0,
    )
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


SAVED = {
    "tiff": lambda: tiff(PICTURE),
    "lzw": lambda: tiff(PICTURE, compression="lzw", predictor=True),
    "pages": lambda: pillow("TIFF", save_all=True, append_images=[Image.new("RGB", (W, H))]),
    "floats": lambda: tiff((PICTURE / 255).astype(np.float32)),
    "16 bits": lambda: tiff(PICTURE * np.uint16(257), compression="deflate"),
    "planar": lambda: tiff(np.moveaxis(PICTURE, -1, 0) * np.uint16(257), planarconfig="separate"),
    "tiled": lambda: tiff(PICTURE * np.uint16(257), tile=(16, 16)),
    "inverted": lambda: tiff(65535 - GREY[..., 0] * np.uint16(257), photometric="miniswhite"),
    "opaque": lambda: tiff(
        np.dstack([PICTURE * np.uint16(257), np.full((H, W), 65535, np.uint16)]), extrasamples=[2]
    ),
    "16-bit png": lambda: tf.io.encode_png(PICTURE * np.uint16(257)).numpy(),
    "ppm": lambda: pillow("PPM"),
    "jpeg 2000": lambda: pillow("JPEG2000", irreversible=False),
    "npy": lambda: npy(PICTURE),
    "npy of floats": lambda: npy(PICTURE / 255),
    "dicom": lambda: dicom(GREY[..., 0]),
    "inverted dicom": lambda: dicom(
        65535 - GREY[..., 0] * np.uint16(257), PhotometricInterpretation="MONOCHROME1"
    ),
}


@pytest.mark.parametrize("saved", SAVED)
def test_one_picture_saved_in_many_ways(saved):
    expected = GREY.repeat(3, -1) if "inverted" in saved or saved == "dicom" else PICTURE
    contents = SAVED[saved]()
    np.testing.assert_array_equal(decode.decode_in_python(contents), expected)
    unit = decode.decode_in_python(contents, dtype="float32")
    np.testing.assert_allclose(unit, expected / np.float32(255), atol=2e-7)


def test_turned_and_transparent():
    turned = tiff(np.rot90(PICTURE) * np.uint16(257), extratags=[(274, "H", 1, 6, True)])
    np.testing.assert_array_equal(decode.decode_in_python(turned), PICTURE)
    alpha = np.where(np.arange(W) < 9, 0, 65535).astype(np.uint16)[None].repeat(H, 0)
    clear = tiff(np.dstack([PICTURE * np.uint16(257), alpha]), extrasamples=[2])
    np.testing.assert_array_equal(decode.decode_in_python(clear), np.where(alpha[..., None], PICTURE, 255))
    assert decode.inspect(clear).traits == (False, True, False) and decode.inspect(turned).traits[0]


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"planarconfig": "separate"}])
def test_channels_are_kept(options):
    pixels = DEEP if not options.get("planarconfig") else np.moveaxis(DEEP, -1, 0)
    contents = tiff(pixels, **options)
    assert str(decode.inspect(contents)) == "TIFF, 16 bits, 5 channels"
    ranges = (0, [4095, 4095, 4095, 4095, 819])
    unit = decode.decode_bytes(contents, value_range=ranges, channels=5, dtype="float32")
    np.testing.assert_allclose(unit, np.minimum(DEEP / np.array(ranges[1]), 1), atol=1e-6)
    with pytest.raises(ValueError, match="5 channels, not 6"):
        decode.decode_in_python(contents, channels=6)


def test_channels_on_pages_and_planes():
    planes = np.moveaxis(DEEP, -1, 0)
    pages, ome = tiff(planes), tiff(planes[None].repeat(2, 0), ome=True, metadata={"axes": "ZCYX"})
    for contents, channels in ((pages, 5), (ome, None)):
        np.testing.assert_array_equal(decode.read(contents, channels=channels)[1].pixels, DEEP)
    np.testing.assert_array_equal(decode.read(pages)[1].pixels, DEEP[..., :1])


def test_dicom_has_the_units_of_its_rescale():
    _, raw = decode.read(dicom(DEEP[..., 0], RescaleSlope=2, RescaleIntercept=-1024))
    np.testing.assert_array_equal(raw.pixels[..., 0], 2 * DEEP[..., 0].astype(np.float32) - 1024)


@pytest.mark.parametrize("contents", [tiff(DEEP)[:-999], npy(DEEP)[:-9], npy(np.array(["a"])), npy(DEEP.T)])
def test_what_is_damaged_or_no_image_is_refused(contents):
    with pytest.raises(ValueError):
        decode.decode_in_python(contents, channels=5)


def write(root, **files):
    root.mkdir(exist_ok=True)
    for name, contents in files.items():
        (root / name.replace("_", ".")).write_bytes(contents)
    return str(root)


def load(path, **keys):
    return datasets.load(config("folder", path=path, **keys), "all", seed=0)


def test_a_range_for_each_channel_is_told_and_kept(tmp_path, capsys):
    weak = DEEP // np.array([1, 1, 1, 1, 10], np.uint16)
    path = write(tmp_path / "five", **{f"{n}_tif": tiff(np.roll(weak, n, 0)) for n in range(3)})
    for _ in range(2):
        source = datasets.load(config("folder", path=path), "train", seed=0, workdir=tmp_path)
        low, high = source.value_range
        assert (source.channels, source.dtype, high[:4]) == (5, "float16", [4095] * 4)
        assert 390 < high[4] < 410 and low == 0
    printed = capsys.readouterr().out
    assert "3 TIFF, 16 bits, 5 channels; black is 0, white [4095, 4095, 4095, 4095, 40" in printed
    image = source.decode(source.records[0]).numpy()
    assert image.shape == (H, W, 5) and image[..., 4].max() == 1


def test_mixed_channels_are_refused_by_name(tmp_path):
    path = write(tmp_path, a_tif=tiff(DEEP), b_png=pillow("PNG"), c_png=pillow("PNG"))
    with pytest.raises(
        UserError, match="a.tif has 5 and b.png has 3 channels: .* --config.dataset.channels=3"
    ):
        load(path)
    assert [
        load(path, channels=3).decode(f"{path}/{name}".encode()).shape[-1] for name in ("a.tif", "b.png")
    ] == [3, 3]


def test_whole_numbers_beside_floats_keep_their_own_ranges(tmp_path):
    path = write(tmp_path, a_tif=SAVED["floats"](), b_tif=SAVED["16 bits"](), c_png=pillow("PNG"))
    source = load(path)
    assert source.value_range is None and source.dtype == "float16"
    for record in source.records:
        np.testing.assert_allclose(source.decode(record), PICTURE / 255, atol=1e-6)


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    path = write(tmp_path, a_tif=tiff(DEEP), b_png=pillow("PNG"))
    with pytest.raises(
        UserError, match=r"1 image, as a.tif: needs tifffile: pip install 'simclr-jax\[images\]'"
    ):
        folder.catalogue(path, seed=0)


def test_arrays_of_an_encoder_are_scaled_by_its_range():
    options = {"value_range": (0, 4095), "channels": 5, "dtype": "float16"}
    np.testing.assert_allclose(to_array(DEEP, "it", **options), DEEP / 4095, atol=1e-6)
    with pytest.raises(UserError, match=r"expected \[h, w, c\], where c is 5"):
        to_array(PICTURE, "it", **options)
