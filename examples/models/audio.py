"""Small speech and sound models, each with a batch: recognition, tagging, classification, synthesis.

Every function returns (model, batch), seeded; `model(**batch)` is a loss or has `.loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

__all__ = [
    "audio_spectrogram_transformer",
    "conv_tagger",
    "data2vec_audio",
    "deep_speech",
    "encodec",
    "hubert",
    "lstm_tagger",
    "mel_classifier",
    "moonshine",
    "packed_tagger",
    "parakeet",
    "sew",
    "speech_to_text",
    "speecht5",
    "univnet",
    "wav2vec2",
    "wav2vec2_conformer",
    "wav2vec2_keywords",
    "wavlm",
    "whisper",
]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

SAMPLES, LETTERS = 4, 32


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _waves(length: int = 400) -> Tensor:
    """Sound [n, length]."""
    return torch.randn(SAMPLES, length, generator=_generator())


def _spoken(length: int = 400, letters: int = 8) -> Batch:
    """Sounds of uneven lengths, padded, with the letters that were said, filled up with -100."""
    generator = _generator()
    labels = torch.randint(1, LETTERS, (SAMPLES, letters), generator=generator)
    labels[1, 5:] = labels[3, 3:] = -100
    seen = torch.arange(length) < torch.tensor([length, 300, 350, 200])[:, None]
    return {"input_values": _waves(length) * seen, "attention_mask": seen.long(), "labels": labels}


def _wave_sizes() -> dict[str, Any]:
    """Of an encoder of raw sound: two convolutions (38 frames of 400 samples), two transformer layers, no masking of the input."""
    return {
        "vocab_size": LETTERS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "conv_dim": (16, 16),
        "conv_kernel": (10, 4),
        "conv_stride": (5, 2),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "pad_token_id": 0,
        "ctc_loss_reduction": "mean",
    }


# Encoders of raw sound.


def wav2vec2() -> Example:
    """Convolutions over raw sound, a grouped convolution with weight norm for positions, CTC with lengths from the mask."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    return Wav2Vec2ForCTC(Wav2Vec2Config(**_wave_sizes())).train(), _spoken()


def wav2vec2_keywords() -> Example:
    """The same encoder with a classifier over a learned mix of its layers, and dropout."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    torch.manual_seed(0)
    sizes = _wave_sizes() | {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    config = Wav2Vec2Config(**sizes, num_labels=10, use_weighted_layer_sum=True, classifier_proj_size=32)
    labels = torch.randint(0, 10, (SAMPLES,), generator=_generator())
    return Wav2Vec2ForSequenceClassification(config).train(), {"input_values": _waves(), "labels": labels}


def wav2vec2_conformer() -> Example:
    """Convolution modules with batch normalisation in each layer, relative positions in the scores."""
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForSequenceClassification

    torch.manual_seed(0)
    sizes = _wave_sizes() | {"max_source_positions": 64, "conv_depthwise_kernel_size": 7, "conformer_conv_dropout": 0.0}
    config = Wav2Vec2ConformerConfig(**sizes, num_labels=10, position_embeddings_type="relative", classifier_proj_size=32)
    labels = torch.randint(0, 10, (SAMPLES,), generator=_generator())
    return Wav2Vec2ConformerForSequenceClassification(config).train(), {"input_values": _waves(), "labels": labels}


def hubert() -> Example:
    """Group normalisation of the first convolution (over time), a class for each sound."""
    from transformers import HubertConfig, HubertForSequenceClassification

    torch.manual_seed(0)
    config = HubertConfig(**_wave_sizes(), num_labels=10, feat_extract_norm="group", classifier_proj_size=32)
    labels = torch.randint(0, 10, (SAMPLES,), generator=_generator())
    return HubertForSequenceClassification(config).train(), {"input_values": _waves(), "labels": labels}


def wavlm() -> Example:
    """Relative positions in buckets, gated by the hidden state; a class for each frame."""
    from transformers import WavLMConfig, WavLMForAudioFrameClassification

    torch.manual_seed(0)
    config = WavLMConfig(**_wave_sizes(), num_labels=4, num_buckets=32, max_bucket_distance=64)
    labels = F.one_hot(torch.randint(0, 4, (SAMPLES, 38), generator=_generator()), 4)
    return WavLMForAudioFrameClassification(config).train(), {"input_values": _waves(), "labels": labels}


def data2vec_audio() -> Example:
    """Five layers of convolutions for positions, layer norms between them; speaker vectors of dilated layers, statistics pooling."""
    from transformers import Data2VecAudioConfig, Data2VecAudioForXVector

    torch.manual_seed(0)
    sizes = _wave_sizes() | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 7}
    config = Data2VecAudioConfig(
        **sizes, num_labels=10, tdnn_dim=(32, 32, 48), tdnn_kernel=(5, 3, 1), tdnn_dilation=(1, 2, 1), xvector_output_dim=32
    )
    labels = torch.randint(0, 10, (SAMPLES,), generator=_generator())
    return Data2VecAudioForXVector(config).train(), {"input_values": _waves(), "labels": labels}


def sew() -> Example:
    """Frames squeezed by pooling before the layers and opened again after them."""
    from transformers import SEWConfig, SEWForSequenceClassification

    torch.manual_seed(0)
    config = SEWConfig(**_wave_sizes(), num_labels=10, squeeze_factor=2, classifier_proj_size=32)
    labels = torch.randint(0, 10, (SAMPLES,), generator=_generator())
    return SEWForSequenceClassification(config).train(), {"input_values": _waves(), "labels": labels}


# Encoders of spectrograms.


def whisper() -> Example:
    """Convolutions over a spectrogram, fixed positions, a decoder with cross attention; some labels ignored."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=128,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=32,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        begin_suppress_tokens=None,
        use_cache=False,
        apply_spec_augment=False,
    )
    return WhisperForConditionalGeneration(config).train(), {"input_features": _spectrogram(16, 64), "labels": _text()}


def speech_to_text() -> Example:
    """Gated convolutions shorten the spectrogram, sinusoidal positions of the seen frames, dropout."""
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    torch.manual_seed(0)
    config = Speech2TextConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        input_feat_per_channel=16,
        conv_channels=32,
        max_source_positions=64,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        use_cache=False,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        dropout=0.1,
    )
    batch = {"input_features": _spectrogram(16, 64).transpose(1, 2).contiguous(), "labels": _text()}
    return Speech2TextForConditionalGeneration(config).train(), batch


def moonshine() -> Example:
    """Raw sound to text: convolutions, one group norm, rotary positions on a part of each head."""
    from transformers import MoonshineConfig, MoonshineForConditionalGeneration

    torch.manual_seed(0)
    config = MoonshineConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    )
    return MoonshineForConditionalGeneration(config).train(), {"input_values": _waves(4000), "labels": _text()}


def parakeet() -> Example:
    """Fast conformer: strided depthwise convolutions, relative positions by shifting scores, batch normalisation, CTC."""
    from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC

    torch.manual_seed(0)
    encoder = ParakeetEncoderConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        conv_kernel_size=5,
        subsampling_factor=4,
        subsampling_conv_channels=16,
        num_mel_bins=16,
        dropout=0.0,
        dropout_positions=0.0,
        layerdrop=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        max_position_embeddings=64,
    )
    config = ParakeetCTCConfig(vocab_size=LETTERS, pad_token_id=0, encoder_config=encoder.to_dict())
    labels = torch.randint(1, LETTERS, (SAMPLES, 6), generator=_generator())
    labels[1, 4:] = 0
    seen = torch.arange(64) < torch.tensor([64, 50, 64, 40])[:, None]
    batch = {"input_features": _spectrogram(16, 64).transpose(1, 2).contiguous(), "attention_mask": seen.long(), "labels": labels}
    return ParakeetForCTC(config).train(), batch


def audio_spectrogram_transformer() -> Example:
    """A vision transformer whose overlapping patches are cut from a spectrogram; two tokens in front."""
    from transformers import ASTConfig, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=8,
        frequency_stride=6,
        time_stride=6,
        max_length=32,
        num_mel_bins=20,
        num_labels=10,
    )
    labels = torch.randint(0, 10, (SAMPLES,), generator=_generator())
    return ASTForAudioClassification(config).train(), {"input_values": _spectrogram(32, 20), "labels": labels}


def _spectrogram(first: int, second: int) -> Tensor:
    return torch.randn(SAMPLES, first, second, generator=_generator())


def _text(length: int = 12, vocabulary: int = 128) -> Tensor:
    """Labels, unevenly many ignored."""
    labels = torch.randint(4, vocabulary, (SAMPLES, length), generator=_generator())
    labels[1, 8:] = labels[3, 5:] = -100
    return labels


class DeepSpeech(nn.Module):
    """Convolutions over a spectrogram [n, frequencies, time], bidirectional recurrent layers, CTC."""

    def __init__(self, frequencies: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 8, (5, 5), stride=(2, 2), padding=(2, 2), bias=False),
            nn.BatchNorm2d(8),
            nn.Hardtanh(0, 20),
            nn.Conv2d(8, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=False),
            nn.BatchNorm2d(8),
            nn.Hardtanh(0, 20),
        )
        self.recurrent = nn.GRU(8 * frequencies // 4, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, LETTERS)

    def forward(self, spectrogram: Tensor, labels: Tensor, frames: Tensor, letters: Tensor) -> Tensor:
        x = self.convolutions(spectrogram[:, None]).flatten(1, 2).transpose(1, 2)
        scores = self.head(self.recurrent(x)[0]).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(scores, labels, frames // 2, letters, zero_infinity=True)


def deep_speech() -> Example:
    """Bidirectional GRU, CTC whose lengths are inputs."""
    torch.manual_seed(0)
    labels = torch.randint(1, LETTERS, (SAMPLES, 8), generator=_generator())
    lengths = {"frames": torch.tensor([64, 50, 60, 40]), "letters": torch.tensor([8, 5, 6, 3])}
    return DeepSpeech().train(), {"spectrogram": _spectrogram(16, 64), "labels": labels, **lengths}


class LstmTagger(nn.Module):
    """A tag for each frame [n, time, features]; padded frames do not count."""

    def __init__(self, features: int = 16, hidden: int = 32, tags: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.recurrent = nn.LSTM(features, hidden, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(hidden, tags)

    def forward(self, features: Tensor, tags: Tensor) -> Tensor:
        logits = self.head(self.recurrent(self.norm(features))[0])
        return F.cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=-1)


def lstm_tagger() -> Example:
    """Two LSTM layers with dropout between them; unevenly many frames are ignored."""
    torch.manual_seed(0)
    tags = torch.randint(0, 8, (SAMPLES, 24), generator=_generator())
    tags[1, 16:] = tags[2, 5:] = -1
    return LstmTagger().train(), {"features": _spectrogram(24, 16), "tags": tags}


class PackedTagger(nn.Module):
    """A tag for each frame, from packed sequences of unlike lengths; the last states of both directions say who speaks."""

    def __init__(self, features: int = 16, hidden: int = 16, tags: int = 8, speakers: int = 5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.recurrent = nn.LSTM(features, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head, self.speaker = nn.Linear(2 * hidden, tags), nn.Linear(2 * hidden, speakers)

    def forward(self, features: Tensor, lengths: Tensor, tags: Tensor, speakers: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.norm(features), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, (last, _) = self.recurrent(packed)
        padded, _ = pad_packed_sequence(states, batch_first=True, total_length=features.shape[1])
        loss = F.cross_entropy(self.head(padded).flatten(0, 1), tags.flatten(), ignore_index=-1)
        return loss + F.cross_entropy(self.speaker(torch.cat([last[-2], last[-1]], 1)), speakers)


def packed_tagger() -> Example:
    """Packed sequences through a bidirectional LSTM; lengths are an input."""
    torch.manual_seed(0)
    lengths = torch.tensor([20, 13, 24, 7])
    tags = torch.randint(0, 8, (SAMPLES, 24), generator=_generator()).masked_fill(torch.arange(24) >= lengths[:, None], -1)
    return PackedTagger().train(), {
        "features": _spectrogram(24, 16),
        "lengths": lengths,
        "tags": tags,
        "speakers": torch.tensor([0, 3, 1, 4]),
    }


class MelClassifier(nn.Module):
    """Spectrogram by short Fourier transforms, a fixed bank of filters, logarithm, convolutions over time."""

    window: Tensor
    bank: Tensor

    def __init__(self, size: int = 64, bands: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size))
        centres = torch.linspace(0, size // 2, bands + 2)
        distance = (torch.arange(size // 2 + 1)[None, :] - centres[1:-1, None]).abs()
        self.register_buffer("bank", (1 - distance / (centres[1] - centres[0])).clamp(min=0))
        self.net = nn.Sequential(nn.Conv1d(bands, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(32, 32, 3))
        self.head = nn.Linear(64, classes)

    def forward(self, wave: Tensor, labels: Tensor) -> Tensor:
        spectrum = torch.stft(wave, self.size, hop_length=self.size // 2, window=self.window, return_complex=True)
        bands = (self.bank @ spectrum.abs().square()).clamp(min=1e-6).log()
        features = self.net(bands - bands.mean(-1, keepdim=True))
        return F.cross_entropy(self.head(torch.cat([features.mean(-1), features.amax(-1)], 1)), labels)


def mel_classifier() -> Example:
    """A complex short-time Fourier transform in front, pooling by mean and by maximum."""
    torch.manual_seed(0)
    return MelClassifier().train(), {"wave": _waves(640), "labels": torch.randint(0, 10, (SAMPLES,), generator=_generator())}


class ConvTagger(nn.Module):
    """Causal dilated convolutions with normalised weights, residual; predicts the next frame."""

    def __init__(self, features: int = 16, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv1d(features, channels, 1)
        self.layers = nn.ModuleList(weight_norm(nn.Conv1d(channels, 2 * channels, 3, dilation=2**i)) for i in range(layers))
        self.outs = nn.ModuleList(weight_norm(nn.Conv1d(channels, channels, 1)) for _ in range(layers))
        self.head = nn.Conv1d(channels, features, 1)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.first(frames[..., :-1])
        for i, (layer, out) in enumerate(zip(self.layers, self.outs, strict=True)):
            x = x + out(F.glu(layer(F.pad(x, (2 ** (i + 1), 0))), dim=1))
        return F.smooth_l1_loss(self.head(x), frames[..., 1:])


def conv_tagger() -> Example:
    """Causal dilated convolutions, weight norm, gated linear units."""
    torch.manual_seed(0)
    return ConvTagger().train(), {"frames": _spectrogram(16, 33)}


# Synthesis.


def speecht5() -> Example:
    """Text to spectrogram: pre-net with dropout that is always on, post-net of convolutions with batch normalisation, a stop token."""
    from transformers import SpeechT5Config, SpeechT5ForTextToSpeech

    torch.manual_seed(0)
    config = SpeechT5Config(
        vocab_size=64,
        hidden_size=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        encoder_layerdrop=0.0,
        decoder_layers=2,
        decoder_ffn_dim=128,
        decoder_attention_heads=4,
        decoder_layerdrop=0.0,
        positional_dropout=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        num_mel_bins=16,
        reduction_factor=2,
        speaker_embedding_dim=16,
        speech_decoder_prenet_units=32,
        speech_decoder_postnet_units=32,
        max_text_positions=32,
        max_speech_positions=64,
        use_guided_attention_loss=False,
        use_cache=False,
    )
    generator = _generator()
    batch = {
        "input_ids": torch.randint(4, 64, (SAMPLES, 12), generator=generator),
        "labels": torch.randn(SAMPLES, 24, 16, generator=generator),
        "speaker_embeddings": torch.randn(SAMPLES, 16, generator=generator),
    }
    batch["labels"][2, 16:] = -100
    return SpeechT5ForTextToSpeech(config).train(), batch


class Vocoded(nn.Module):
    """Squared error of a vocoder's sound, as it is and as a spectrum."""

    def __init__(self, vocoder: nn.Module) -> None:
        super().__init__()
        self.vocoder = vocoder

    def forward(self, spectrogram: Tensor, noise: Tensor, wave: Tensor) -> Tensor:
        made = self.vocoder(input_features=spectrogram, noise_sequence=noise).waveforms
        return F.l1_loss(made, wave) + F.l1_loss(torch.fft.rfft(made).abs(), torch.fft.rfft(wave).abs())


def univnet() -> Example:
    """Convolutions whose kernels are made from the spectrogram, one for each place; a spectral loss."""
    from transformers import UnivNetConfig, UnivNetModel

    torch.manual_seed(0)
    config = UnivNetConfig(
        model_in_channels=8,
        model_hidden_channels=8,
        num_mel_bins=16,
        resblock_kernel_sizes=[3],
        resblock_stride_sizes=[4],
        resblock_dilation_sizes=[[1, 3]],
        kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=8,
        kernel_predictor_dropout=0.0,
    )
    generator = _generator()
    batch = {"spectrogram": _spectrogram(12, 16), "noise": torch.randn(SAMPLES, 12, 8, generator=generator), "wave": _waves(48)}
    return Vocoded(UnivNetModel(config)).train(), batch


class Coded(nn.Module):
    """Squared error of a codec's sound."""

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, wave: Tensor) -> Tensor:
        latent = self.codec.encoder(wave)
        codes = self.codec.quantizer.encode(latent)
        nearest = self.codec.quantizer.decode(codes)
        through = latent + (nearest - latent).detach()
        return F.l1_loss(self.codec.decoder(through), wave) + F.mse_loss(latent, nearest.detach())


def encodec() -> Example:
    """Strided causal convolutions with weight norm, an LSTM, residual vector quantisation, transposed convolutions."""
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    config = EncodecConfig(
        hidden_size=16,
        codebook_dim=16,
        codebook_size=32,
        num_filters=8,
        num_residual_layers=1,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
        sampling_rate=8000,
        target_bandwidths=[20.0],
    )
    model = EncodecModel(config)
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=0.1)
    return Coded(model).train(), {"wave": _waves(256)[:, None]}
