# UC Merced Land Use: 21 classes of aerial scenes, about 0.3 m per pixel (1,260 images, 256 px).
#
# Command   dino-adapters evaluate tasks/satellite/ucmerced/recipe.py \
#               data.source=UCMERCED split=UCMERCED/splits.json backbone=runs/a/export \
#               --out runs/ucmerced
# Data      UCMERCED/CLASS/CLASSnn.jpg and UCMERCED/splits.json. Y. Yang and S. Newsam,
#           "Bag-of-visual-words and spatial extensions for land-use classification", ACM GIS 2010.
#           The original TIFF files do as well; they need the extra dino-adapters[satellite].
# Licence   Imagery of the USGS, public domain; the authors ask for a citation.
# Split     Fixed, in splits.json: neighbouring numbers were cut from one large photograph, so
#           train is 00-29, val 40-49 and test 60-79 of every class; groups are blocks of ten.
#           A random split gives colour statistics 0.585 where this one gives 0.295.
# Expect    Colour statistics with logistic regression reach a balanced accuracy of 0.117 with 1
#           image per class, 0.240 with 5 and 0.295 with all; chance is 0.048.
# Hardware  One CPU core.

data = dict(labels="folder")
size = 224
shots = [1, 3, 5]
draws = 10
