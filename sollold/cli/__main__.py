from sollold.cli import main

main()
