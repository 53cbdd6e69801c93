"""From DPO and training settings to TRL: the only room, with engine/, that knows TRL's names."""
