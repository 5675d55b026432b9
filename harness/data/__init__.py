"""From DATA on the command line to batches on the device.

    opening     from DATA to images, and what a run says of them
    layouts     what DATA can be: a table of layouts, and a look that reads nothing yet
    walk        the files below a folder, and why some of them are no images
    splits      where in a folder the training and validation images are, their classes and labels
    lists       text files that name images, and what is no such list
    tars        uncompressed tar files in the place of folders
    cifar       CIFAR-10 and CIFAR-100 as they are downloaded
    shapes      the drawn data set, for which nothing is downloaded
    captions    words for what was drawn, lists of images with captions, and words as numbers
    source      a split of a data set: images in memory or files, and labels
    images      reading one image file, good or bad
    values      pixels of more than 8 bits
    loading     worker processes, from files to batches
"""
