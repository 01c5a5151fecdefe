"""`--mode prior` with one more arm, `pca-bridge`: a bridge whose priors are principal components,
decoded linearly, which is what a DIP's decoder must beat. Flags are those of dipddpm.py.

    python -m studies.bridges --mode prior --dip-source bridge
"""

import dipddpm

dipddpm.BRIDGES["pca-bridge"] = "pca"

if __name__ == "__main__":
    dipddpm.main()
