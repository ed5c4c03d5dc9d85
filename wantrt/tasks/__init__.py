"""What each task does before the denoising loop: image, frames, masks, audio -> conditioning.

Text to video needs nothing but the prompt. Another task gets a file here and its name in
`wantrt.config.TASKS`.
"""
