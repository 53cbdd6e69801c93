from dpo_lora.cli import main

main()
