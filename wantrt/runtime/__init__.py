"""From a bundle to frames: sessions, the denoising loop, the streaming decoder, the pipeline."""
