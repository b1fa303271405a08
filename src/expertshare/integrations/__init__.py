"""expertshare inside software that people already use: one package for each."""
