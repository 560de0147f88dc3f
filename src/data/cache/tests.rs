use super::*;
use crate::image::Layout;
use crate::os::FileExt;

fn stamp(size: u64) -> Stamp {
    Stamp { size, modified: 5 }
}

fn color(width: usize, height: usize, value: u8) -> Image {
    Image::from_rgb(width, height, &vec![value; 3 * width * height]).unwrap()
}

fn gray(width: usize, value: u8) -> Image {
    Image { width, height: 1, layout: Layout::Gray, data: vec![value; width] }
}

fn packed(image: &Image) -> (usize, usize, Vec<u8>) {
    (image.width, image.height, image.to_packed())
}

fn assert_keeps(cache: &Cache) {
    let mut found = Image::default();
    assert!(!cache.get(Path::new("/a"), stamp(1), &mut found));
    cache.put(Path::new("/a"), stamp(1), &color(3, 2, 7));
    cache.put(Path::new("/b"), stamp(1), &gray(5, 9));
    assert!(cache.get(Path::new("/b"), stamp(1), &mut found));
    assert_eq!((packed(&found), found.layout), ((5, 1, vec![9; 5]), Layout::Gray));
    assert!(cache.get(Path::new("/a"), stamp(1), &mut found));
    assert_eq!((packed(&found), found.layout), ((3, 2, vec![7; 18]), Layout::Rgbx));
    assert!(!cache.get(Path::new("/a"), stamp(2), &mut found), "the file has changed");
    assert!(!cache.get(Path::new("/a"), Stamp { size: 1, modified: 6 }, &mut found));
    cache.put(Path::new("/a"), stamp(2), &color(1, 1, 8));
    assert!(cache.get(Path::new("/a"), stamp(2), &mut found));
    assert_eq!(packed(&found), (1, 1, vec![8; 3]));
    assert_eq!(cache.status().images, 2);
}

#[test]
fn both_kinds_keep_what_they_were_given() {
    assert_keeps(&Cache::in_memory(10_000));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new").join("images.cache");
    assert_keeps(&Cache::in_file(&path, b"key", 10_000).unwrap());
    let again = Cache::in_file(&path, b"key", 10_000).unwrap();
    let mut found = Image::default();
    assert!(again.get(Path::new("/a"), stamp(2), &mut found), "another process finds it");
    assert_eq!(packed(&found), (1, 1, vec![8; 3]));
    assert_eq!(again.status().images, 2);
    let other = Cache::in_file(&path, b"kez", 10_000).unwrap();
    assert_eq!(other.status().images, 0, "another key shares nothing");
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn the_limit_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.cache");
    for cache in [Cache::in_memory(2_000), Cache::in_file(&path, b"key", 2_000).unwrap()] {
        for i in 0..20 {
            cache.put(Path::new(&format!("/{i}")), stamp(1), &color(10, 10, i));
        }
        let status = cache.status();
        assert!(status.bytes <= 2_000 && status.images >= 4, "{status:?}");
        assert_eq!(status.images + status.refused, 20);
        let mut found = Image::default();
        assert!(cache.get(Path::new("/0"), stamp(1), &mut found));
        assert!(!cache.get(Path::new("/19"), stamp(1), &mut found));
    }
    assert!(std::fs::metadata(&path).unwrap().len() <= 2_000);
}

#[test]
fn a_damaged_file_is_never_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.cache");
    let fill = || {
        let cache = Cache::in_file(&path, b"key", 10_000).unwrap();
        for i in 0..3 {
            cache.put(Path::new(&format!("/{i}")), stamp(1), &color(4, 4, i));
        }
        std::fs::read(&path).unwrap()
    };
    let whole = fill();
    let right = |cache: &Cache, i: u8| {
        let mut found = Image::default();
        let there = cache.get(Path::new(&format!("/{i}")), stamp(1), &mut found);
        assert!(!there || packed(&found) == (4, 4, vec![i; 48]), "wrong pixels for {i}");
        there
    };
    // Every single byte turned, and every shorter file.
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 0x55;
        std::fs::write(&path, &bad).unwrap();
        let cache = Cache::in_file(&path, b"key", 10_000).unwrap();
        let found = (0..3).filter(|&i| right(&cache, i)).count();
        assert!(found < 3, "byte {at} is part of something");
    }
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let cache = Cache::in_file(&path, b"key", 10_000).unwrap();
        (0..3).for_each(|i| assert!(!right(&cache, i) || length > whole.len() / 2));
        cache.put(Path::new("/0"), stamp(1), &color(4, 4, 0));
        assert!(right(&cache, 0));
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_a_process_that_died_left_behind_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.cache");
    let cache = Cache::in_file(&path, b"key", 10_000).unwrap();
    cache.put(Path::new("/a"), stamp(1), &color(4, 4, 1));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    // Half a record behind the committed end.
    file.write_all_at(b"IMG1 and half a record", std::fs::metadata(&path).unwrap().len()).unwrap();
    drop(cache);
    let cache = Cache::in_file(&path, b"key", 10_000).unwrap();
    cache.put(Path::new("/b"), stamp(1), &color(4, 4, 2));
    let again = Cache::in_file(&path, b"key", 10_000).unwrap();
    let mut found = Image::default();
    for (name, value) in [("/a", 1), ("/b", 2)] {
        assert!(again.get(Path::new(name), stamp(1), &mut found));
        assert_eq!(packed(&found).2, vec![value; 48]);
    }
}

#[test]
fn two_that_append_at_once_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.cache");
    // Two opened files are two holders of the lock, as two processes are.
    let caches = [0, 1].map(|_| Cache::in_file(&path, b"key", 1 << 20).unwrap());
    std::thread::scope(|scope| {
        for (who, cache) in caches.iter().enumerate() {
            for part in 0..2_u8 {
                scope.spawn(move || {
                    for i in 0..50_u8 {
                        // Half of the names are of both.
                        let name = if i % 2 == 0 { format!("/both/{part}/{i}") } else { format!("/{who}/{part}/{i}") };
                        cache.put(Path::new(&name), stamp(1), &color(5, 5, i));
                    }
                });
            }
        }
    });
    for cache in caches.into_iter().chain([Cache::in_file(&path, b"key", 1 << 20).unwrap()]) {
        cache.refresh();
        let status = cache.status();
        assert_eq!((status.images, status.trouble), (150, None));
        let record = 40 + 75;
        assert!(status.bytes < 150 * (record + 16) + 40, "nothing is there twice: {}", status.bytes);
        let mut found = Image::default();
        for who in 0..2 {
            for i in (1..50_u8).step_by(2) {
                assert!(cache.get(Path::new(&format!("/{who}/1/{i}")), stamp(1), &mut found));
                assert_eq!(packed(&found), (5, 5, vec![i; 75]));
            }
        }
    }
}
