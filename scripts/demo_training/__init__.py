"""How the bundled demo model was made. `scripts/train_demo_model.py` is the command."""
