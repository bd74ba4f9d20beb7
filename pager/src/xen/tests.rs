//! The pages of a domain against a model of the hypervisor, written after `xen/arch/x86/mm/mem_paging.c`.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use roaring::RoaringBitmap;

use super::paged::{Hypervisor, PagedDomain, Span};
use super::ring::BackRing;
use super::ring::model::FrontRing;
use crate::place::{FaultAnswer, FaultSink};
use crate::{MissingMap, PAGE_SIZE, PagerError};

const FIRST: u64 = 0x100;
const BLOCKS: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Present(u8),
    Nominated,
    Paged,
}

/// A domain of one span whose pages each hold one byte, repeated.
#[derive(Default)]
struct Model {
    pages: Mutex<BTreeMap<u64, Page>>,
    /// How often a page is still found busy.
    busy: Mutex<BTreeMap<u64, u32>>,
    notified: Mutex<u32>,
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Model {
    fn new() -> Arc<Self> {
        let this = Self::default();
        let pages = (0..u64::from(BLOCKS)).map(|block| (FIRST + block, Page::Present(0)));
        this.pages.lock().unwrap().extend(pages);
        Arc::new(this)
    }

    fn page(&self, gfn: u64) -> Page {
        self.pages.lock().unwrap()[&gfn]
    }

    fn set(&self, gfn: u64, page: Page) {
        self.pages.lock().unwrap().insert(gfn, page);
    }
}

impl Hypervisor for Model {
    fn nominate(&self, gfn: u64) -> io::Result<()> {
        let mut busy = self.busy.lock().unwrap();
        if let Some(left) = busy.get_mut(&gfn).filter(|left| **left > 0) {
            *left -= 1;
            return Err(errno(libc::EBUSY));
        }
        match self.page(gfn) {
            Page::Present(_) => self.set(gfn, Page::Nominated),
            _ => return Err(errno(libc::EBUSY)),
        }
        Ok(())
    }

    fn evict(&self, gfn: u64) -> io::Result<()> {
        match self.page(gfn) {
            Page::Nominated => self.set(gfn, Page::Paged),
            _ => return Err(errno(libc::EBUSY)),
        }
        Ok(())
    }

    fn load(&self, gfn: u64, page: &[u8]) -> io::Result<()> {
        assert_eq!(page.len(), PAGE_SIZE);
        match self.page(gfn) {
            Page::Paged => self.set(gfn, Page::Present(page[0])),
            _ => return Err(errno(libc::ENOENT)),
        }
        Ok(())
    }

    fn write(&self, gfn: u64, data: &[u8]) -> io::Result<()> {
        for (gfn, page) in (gfn..).zip(data.chunks(PAGE_SIZE)) {
            match self.page(gfn) {
                Page::Present(_) => self.set(gfn, Page::Present(page[0])),
                _ => return Err(errno(libc::ENOENT)),
            }
        }
        Ok(())
    }

    fn read(&self, gfn: u64, data: &mut [u8]) -> io::Result<()> {
        match self.page(gfn) {
            Page::Present(byte) => data.fill(byte),
            _ => return Err(errno(libc::ENOENT)),
        }
        Ok(())
    }

    fn notify(&self) -> io::Result<()> {
        *self.notified.lock().unwrap() += 1;
        Ok(())
    }
}

#[derive(Default)]
struct Heard(Mutex<Vec<(u16, u32)>>);

impl FaultSink for Heard {
    fn fault(&self, region: u16, block: u32) -> FaultAnswer {
        self.0.lock().unwrap().push((region, block));
        FaultAnswer::Requested
    }

    fn removed(&self, region: u16, first: u32, _: u32) {
        self.0.lock().unwrap().push((region + 100, first));
    }

    fn failed(&self, error: PagerError) {
        panic!("{error}");
    }
}

fn spans() -> Vec<Span> {
    vec![Span {
        first: FIRST,
        blocks: BLOCKS,
    }]
}

fn domain(model: &Arc<Model>) -> PagedDomain {
    let missing = Arc::new(MissingMap::in_memory(&[BLOCKS]).unwrap());
    PagedDomain::new(Arc::clone(model) as Arc<dyn Hypervisor>, spans(), missing)
}

fn ring(front: &mut FrontRing) -> BackRing {
    // SAFETY: the page outlives the ring in every test, and both ends are used one after the other.
    unsafe { BackRing::init(front.page()) }
}

fn set(blocks: impl IntoIterator<Item = u32>) -> RoaringBitmap {
    blocks.into_iter().collect()
}

#[test]
fn a_vcpu_is_answered_after_its_page_is_there_and_never_before() {
    let (model, heard) = (Model::new(), Heard::default());
    let pages = domain(&model);
    let mut front = FrontRing::new();
    pages.set_ring(ring(&mut front));
    pages.arm(&[set(0..8)]).unwrap();
    assert_eq!(model.page(FIRST + 3), Page::Paged);
    // Two vCPUs at one page, one at a page that is there.
    front.put(0, 1, FIRST + 3, 0);
    front.put(1, 1, FIRST + 3, 0);
    front.put(2, 1, FIRST + 20, 0);
    pages.serve(&heard).unwrap();
    assert_eq!(heard.0.lock().unwrap().as_slice(), [(0, 3), (0, 3)]);
    assert_eq!(
        front.responses().iter().map(|r| r.3).collect::<Vec<_>>(),
        [2]
    );
    pages.place(0, 3, &[9; PAGE_SIZE]).unwrap();
    assert_eq!(model.page(FIRST + 3), Page::Present(9));
    let answered: Vec<_> = front.responses().iter().map(|r| (r.3, r.4)).collect();
    assert_eq!(answered, [(0, FIRST + 3), (1, FIRST + 3)]);
    assert_eq!(*model.notified.lock().unwrap(), 2);
    // What the guest has written since stays.
    model.set(FIRST + 3, Page::Present(77));
    pages.place(0, 3, &[8; PAGE_SIZE]).unwrap();
    assert_eq!(model.page(FIRST + 3), Page::Present(77));
    let stats = pages.stats();
    assert_eq!((stats.faults, stats.threads.len()), (2, 3));
    assert_eq!(pages.missing().count(), 7);
}

#[test]
fn what_was_taken_away_early_is_written_all_the_same() {
    let model = Model::new();
    let pages = domain(&model);
    let mut front = FrontRing::new();
    pages.set_ring(ring(&mut front));
    pages.evict(0, &set(0..BLOCKS)).unwrap();
    let mut data = vec![0; 4 * PAGE_SIZE];
    for (n, page) in data.chunks_mut(PAGE_SIZE).enumerate() {
        page.fill(n as u8 + 1);
    }
    pages.write(0, 2, &data).unwrap();
    // Present by now, and written over as before.
    pages.write(0, 3, &data[..PAGE_SIZE]).unwrap();
    let mut page = [7; PAGE_SIZE];
    pages.read(0, 9, &mut page).unwrap();
    assert_eq!(page, [0; PAGE_SIZE]);
    pages.arm(&[set([4, 10])]).unwrap();
    let seen: Vec<Page> = (2..12).map(|block| model.page(FIRST + block)).collect();
    let (zero, out) = (Page::Present(0), Page::Paged);
    let wanted = [
        Page::Present(1),
        Page::Present(1),
        out,
        Page::Present(4),
        zero,
        zero,
        zero,
        zero,
        out,
        zero,
    ];
    assert_eq!(seen, wanted);
}

#[test]
fn a_page_that_somebody_holds_for_a_moment_is_taken_a_little_later() {
    let model = Model::new();
    model.busy.lock().unwrap().insert(FIRST + 1, 3);
    let pages = domain(&model);
    pages.evict(0, &set([1])).unwrap();
    assert_eq!(model.page(FIRST + 1), Page::Paged);
    model.busy.lock().unwrap().insert(FIRST + 2, u32::MAX);
    let error = pages.evict(0, &set([2])).unwrap_err();
    assert!(error.to_string().contains("0x102"), "{error}");
}

#[test]
fn a_page_that_the_guest_gave_back_is_not_brought_in() {
    let (model, heard) = (Model::new(), Heard::default());
    let pages = domain(&model);
    let mut front = FrontRing::new();
    pages.set_ring(ring(&mut front));
    pages.arm(&[set([5])]).unwrap();
    front.put(0, 0, FIRST + 5, 1);
    pages.serve(&heard).unwrap();
    assert_eq!(heard.0.lock().unwrap().as_slice(), [(100, 5)]);
    assert_eq!(front.responses().len(), 1);
    pages.place(0, 5, &[1; PAGE_SIZE]).unwrap();
    assert_eq!(model.page(FIRST + 5), Page::Paged);
    assert!(pages.missing().is_empty());
}

#[test]
fn another_pager_goes_on() {
    let (model, heard) = (Model::new(), Heard::default());
    let mut front = FrontRing::new();
    let missing = {
        let pages = domain(&model);
        pages.set_ring(ring(&mut front));
        pages.arm(&[set(0..4)]).unwrap();
        front.put(0, 1, FIRST, 0);
        pages.serve(&heard).unwrap();
        // Killed between bringing a page in and noting it; then the guest has written to it.
        model.load(FIRST + 1, &[5; PAGE_SIZE]).unwrap();
        model.set(FIRST + 1, Page::Present(6));
        Arc::clone(pages.missing())
    };
    let next = PagedDomain::take_over(Arc::clone(&model) as Arc<dyn Hypervisor>, spans(), missing);
    // SAFETY: as in `ring`.
    let (back, waiting) = unsafe { BackRing::resume(front.page()) }.unwrap();
    next.set_ring(back);
    next.go_on(waiting, &heard).unwrap();
    assert_eq!(
        heard.0.lock().unwrap().as_slice(),
        [(0, 0), (0, 0)],
        "asked for again"
    );
    next.place(0, 0, &[1; 4 * PAGE_SIZE]).unwrap();
    assert_eq!(front.responses().len(), 1);
    let seen: Vec<Page> = (0..4).map(|block| model.page(FIRST + block)).collect();
    assert_eq!(seen, [1, 6, 1, 1].map(Page::Present));
    assert!(next.missing().is_empty());
}

#[test]
fn what_lies_outside_is_refused() {
    let pages = domain(&Model::new());
    let page = [0; PAGE_SIZE];
    assert!(matches!(
        pages.write(0, BLOCKS, &page),
        Err(PagerError::OutOfRange { .. })
    ));
    assert!(matches!(
        pages.place(0, u32::MAX, &page),
        Err(PagerError::OutOfRange { .. })
    ));
    assert!(matches!(
        pages.place(1, 0, &page),
        Err(PagerError::NoSuchRegion { .. })
    ));
    assert!(matches!(
        pages.write(0, 0, &page[1..]),
        Err(PagerError::NotWholePages { .. })
    ));
    assert!(pages.evict(0, &set([BLOCKS])).is_err());
}

#[derive(Clone, Debug)]
enum Step {
    /// A vCPU touches a block.
    Touch(u32, u32),
    /// A page arrives, perhaps twice.
    Arrive(u32),
    /// The pager dies, and another goes on.
    Die,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..6_u32, 0..BLOCKS).prop_map(|(vcpu, block)| Step::Touch(vcpu, block)),
        4 => (0..BLOCKS).prop_map(Step::Arrive),
        1 => Just(Step::Die),
    ]
}

proptest! {
    /// Whatever the order: every vCPU that waits is answered once, after its page has come, with the right contents.
    #[test]
    fn every_vcpu_goes_on_with_the_right_page(steps in prop::collection::vec(step(), 1..120)) {
        let (model, heard) = (Model::new(), Heard::default());
        let mut pages = domain(&model);
        let mut front = FrontRing::new();
        pages.set_ring(ring(&mut front));
        pages.arm(&[set(0..BLOCKS)]).unwrap();
        let mut waits: BTreeMap<u32, u64> = BTreeMap::new();
        let content = |block: u32| [block as u8 ^ 0x5a; PAGE_SIZE];
        let check = |front: &mut FrontRing, waits: &mut BTreeMap<u32, u64>| {
            for (.., vcpu, gfn, _) in front.responses() {
                prop_assert_eq!(waits.remove(&vcpu), Some(gfn), "vCPU {} did not wait for it", vcpu);
                let block = (gfn - FIRST) as u32;
                prop_assert_eq!(model.page(gfn), Page::Present(content(block)[0]));
            }
            Ok(())
        };
        for step in steps {
            match step {
                Step::Touch(vcpu, block) => {
                    let gfn = FIRST + u64::from(block);
                    let lacks = model.page(gfn) == Page::Paged;
                    if lacks && !waits.contains_key(&vcpu) && front.put(vcpu, 1, gfn, 0) {
                        waits.insert(vcpu, gfn);
                        pages.serve(&heard).unwrap();
                    }
                }
                Step::Arrive(block) => pages.place(0, block, &content(block)).unwrap(),
                Step::Die => {
                    let missing = Arc::clone(pages.missing());
                    let hypervisor = Arc::clone(&model) as Arc<dyn Hypervisor>;
                    pages = PagedDomain::take_over(hypervisor, spans(), missing);
                    // SAFETY: as in `ring`.
                    let (back, waiting) = unsafe { BackRing::resume(front.page()) }.unwrap();
                    prop_assert_eq!(waiting.len(), waits.len());
                    pages.set_ring(back);
                    pages.go_on(waiting, &heard).unwrap();
                }
            }
            check(&mut front, &mut waits)?;
        }
        for block in 0..BLOCKS {
            pages.place(0, block, &content(block)).unwrap();
        }
        check(&mut front, &mut waits)?;
        prop_assert!(waits.is_empty(), "{:?} wait for ever", waits);
        prop_assert!(pages.missing().is_empty());
    }
}
