def test_x(distil):
    print(distil())
