use super::*;
use crate::data::plan::{Conversion, Output, Rows};
use crate::data::{DType, Failure};
use crate::image::{Finish, Op, PillowOrder, ReadOptions, Transform};

struct Bytes(Vec<u8>);
impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn plan(ops: Vec<Op>, finish: Finish) -> Plan {
    let transform = Transform { ops, finish, erase: None, order: PillowOrder::Pillow13 };
    let output = Output::Tensor(Conversion::Transform);
    Plan::new(transform, output, ReadOptions::default(), 1)
}

fn gray(height: usize, width: usize, value: u8) -> Input {
    Input::Pixels(Raw { height, width, channels: 1, data: vec![value; height * width] })
}

fn samples(inputs: impl IntoIterator<Item = Input>) -> Vec<Sample> {
    let inputs = inputs.into_iter().zip(0..);
    inputs.map(|(input, i)| Sample { index: i, position: i, input }).collect()
}

/// The result of the oldest batch.
fn wait(loader: &mut Loader) -> Ready {
    let ticket = loader.queue[0].0;
    wait_for(loader, ticket)
}

fn wait_for(loader: &mut Loader, ticket: u64) -> Ready {
    loop {
        if let Some(ready) = loader.poll(ticket, Duration::from_millis(10)).unwrap() {
            return ready;
        }
    }
}

#[test]
fn batches_come_in_the_order_they_were_asked_for() {
    for threads in [0, 1, 4] {
        let mut loader = Loader::new(plan(vec![], Finish::Uint8), threads, Memory::new(2), 2);
        for batch in 0..20_u8 {
            loader.submit(samples((0..5).map(|i| gray(3, 4, batch * 5 + i)))).unwrap();
        }
        for batch in 0..20_u8 {
            let Ready::Batch(ready) = wait(&mut loader) else { panic!("equal shapes make a batch") };
            assert_eq!((ready.dtype, ready.shape.as_slice()), (DType::Uint8, [5, 1, 3, 4].as_slice()));
            let expected: Vec<u8> = (0..5).flat_map(|i| vec![batch * 5 + i; 12]).collect();
            assert_eq!(ready.bytes(), expected);
        }
        assert_eq!(loader.queue.len(), 0);
        assert!(loader.poll(19, Duration::ZERO).is_err());
    }
}

#[test]
fn different_shapes_come_apart() {
    let mut loader = Loader::new(plan(vec![], Finish::Uint8), 3, Memory::new(2), 2);
    loader.submit(samples([gray(1, 2, 1), gray(2, 2, 2), gray(1, 2, 3), gray(3, 1, 4)])).unwrap();
    let Ready::Ragged(ready) = wait(&mut loader) else { panic!("shapes differ") };
    let shapes: Vec<_> = ready.iter().map(|sample| sample.shape.clone()).collect();
    assert_eq!(shapes, [[1, 1, 2], [1, 2, 2], [1, 1, 2], [1, 3, 1]]);
    assert!(ready.iter().zip(1..).all(|(sample, value)| sample.bytes().iter().all(|&byte| byte == value)));
}

#[test]
fn failures_are_all_reported_and_can_be_mended() {
    let missing = || Input::File("/nowhere/at/all.jpg".into());
    let mut loader = Loader::new(plan(vec![], Finish::Uint8), 2, Memory::new(2), 2);
    let first = loader.submit(samples([gray(1, 1, 1), missing(), gray(1, 1, 3), missing()])).unwrap();
    let second = loader.submit(samples([missing()])).unwrap();
    let Ready::Failed(failures) = wait(&mut loader) else { panic!("two files are missing") };
    assert_eq!(failures.iter().map(|failure| failure.sample).collect::<Vec<_>>(), [1, 3]);
    assert!(failures.iter().all(|failure| failure.error.to_string().contains("/nowhere/at/all.jpg")));
    for failure in failures {
        let data = vec![u8::try_from(failure.sample).unwrap() + 1];
        loader.retry(first, failure.sample, Raw { height: 1, width: 1, channels: 1, data }).unwrap();
    }
    let Ready::Batch(batch) = wait(&mut loader) else { panic!("nothing is missing any more") };
    assert_eq!(batch.bytes(), [1, 2, 3, 4]);
    assert!(matches!(wait(&mut loader), Ready::Failed(_)));
    assert!(loader.retry(second, 0, Raw { height: 1, width: 1, channels: 1, data: vec![] }).is_err());
    // It was returned long ago.
    loader.discard(first);
    assert_eq!(loader.queue.len(), 1);
    loader.discard(second);
    assert_eq!(loader.queue.len(), 0);
}

#[test]
fn batches_that_nobody_asks_for_are_passed_over() {
    for threads in [0, 2] {
        let mut loader = Loader::new(plan(vec![], Finish::Uint8), threads, Memory::new(2), 2);
        let tickets: Vec<_> = (0..5).map(|i| loader.submit(samples([gray(1, 1, i)])).unwrap()).collect();
        for (i, left) in [(0, 4), (3, 1)] {
            let Ready::Batch(batch) = wait_for(&mut loader, tickets[i]) else { panic!("equal shapes make a batch") };
            assert_eq!((usize::from(batch.bytes()[0]), loader.queue.len()), (i, left));
        }
        assert!(loader.poll(tickets[1], Duration::ZERO).is_err());
        assert_eq!(loader.queue.len(), 1);
    }
}

#[test]
fn rows_are_looked_up_with_the_transforms_own_numbers() {
    let data: Vec<u8> = (0..=255).cycle().take(3 * 20 * 20).collect();
    let normalize = Finish::Normalize { mean: vec![0.1307], std: vec![0.3081] };
    let mut loaders: Vec<_> = [true, false]
        .map(|rows| {
            let mut plan = plan(vec![], normalize.clone());
            plan.rows = rows.then(|| Rows { data: Box::new(Bytes(data.clone())), height: 20, width: 20 });
            Loader::new(plan, 2, Memory::new(2), 2)
        })
        .into();
    loaders[0].submit(samples([2, 0, 1].map(Input::Row))).unwrap();
    let raw = |i: usize| Raw { height: 20, width: 20, channels: 1, data: data[i * 400..(i + 1) * 400].to_vec() };
    loaders[1].submit(samples([2, 0, 1].map(raw).map(Input::Pixels))).unwrap();
    let ready: Vec<_> = loaders.iter_mut().map(wait).collect();
    let [Ready::Batch(a), Ready::Batch(b)] = ready.as_slice() else { panic!("two batches") };
    assert_eq!((a.bytes(), &a.shape), (b.bytes(), &b.shape));

    let ticket = loaders[0].submit(samples([Input::Row(3)])).unwrap();
    assert!(matches!(wait(&mut loaders[0]), Ready::Failed(_)));
    loaders[0].discard(ticket);
    loaders[0].submit(samples([Input::Row(usize::MAX)])).unwrap();
    assert!(matches!(wait(&mut loaders[0]), Ready::Failed(_)));
}

#[test]
fn a_dropped_loader_leaves_its_work() {
    let memory = Memory::new(2);
    let mut loader = Loader::new(plan(vec![], Finish::Float), 1, Arc::clone(&memory), 2);
    for _ in 0..500 {
        loader.submit(samples((0..8).map(|i| gray(200, 200, i)))).unwrap();
    }
    let shared = Arc::downgrade(&loader.shared);
    let begin = Instant::now();
    drop(loader);
    while shared.strong_count() > 0 {
        // The work would take seconds; leaving it takes one sample.
        assert!(begin.elapsed() < Duration::from_secs(5), "the threads go on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Panicking;
impl AsRef<[u8]> for Panicking {
    fn as_ref(&self) -> &[u8] {
        panic!("injected")
    }
}

#[test]
fn a_panic_is_the_failure_of_its_sample() {
    for threads in [0, 2] {
        let mut plan = plan(vec![Op::VerticalFlip { p: 0.5 }], Finish::Float);
        plan.rows = Some(Rows { data: Box::new(Panicking), height: 1, width: 1 });
        let mut loader = Loader::new(plan, threads, Memory::new(2), 2);
        let ticket = loader.submit(samples([gray(1, 1, 7), Input::Row(0), gray(1, 1, 7)])).unwrap();
        let Ready::Failed(failures) = wait(&mut loader) else { panic!("the row panics") };
        let [Failure { sample: 1, error: Error::Panic(text) }] = failures.as_slice() else { panic!("one failure") };
        assert_eq!(text, "injected");
        loader.drop_samples(ticket, &[1]);
        let Ready::Batch(batch) = wait(&mut loader) else { panic!("the others are well") };
        assert_eq!(
            (&batch.bytes()[..4], &batch.bytes()[8..]),
            (&(7.0_f32 / 255.0).to_ne_bytes()[..], &(7.0_f32 / 255.0).to_ne_bytes()[..])
        );
    }
}

#[test]
fn dropped_samples_are_missing_among_different_shapes() {
    let missing = Input::File("/nowhere/at/all.jpg".into());
    let mut loader = Loader::new(plan(vec![], Finish::Uint8), 2, Memory::new(2), 2);
    let ticket = loader.submit(samples([gray(1, 1, 1), missing, gray(1, 2, 3), gray(1, 1, 4)])).unwrap();
    assert!(matches!(wait(&mut loader), Ready::Failed(_)));
    loader.drop_samples(ticket, &[1]);
    let Ready::Ragged(ready) = wait(&mut loader) else { panic!("shapes differ") };
    assert_eq!(ready.iter().map(|one| one.bytes().to_vec()).collect::<Vec<_>>(), [vec![1], vec![3, 3], vec![4]]);
}
