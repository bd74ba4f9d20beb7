//! What is left of namespaces, devices and names when their owner ends: nothing, however it ends.
//! Takes root.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hybridmig_netem::namespace::{NamespaceError, remove_stale};
use hybridmig_netem::{Namespace, TunConfig, TunLink};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// No single step of a test takes longer on any machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test with a `/run` of its own, so that the machine's is left alone.
fn in_private_run(test: impl FnOnce() + Send) {
    let enter = || {
        unshare(CloneFlags::CLONE_NEWNS).expect("these tests take root: no mount namespace");
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let none = MsFlags::empty();
        mount(Some("run"), "/run", Some("tmpfs"), none, None::<&str>).unwrap();
        test();
    };
    std::thread::scope(|scope| {
        if let Err(panic) = scope.spawn(enter).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A process that holds a link. It is killed, and waited for, when this is dropped.
struct Holder {
    child: Child,
    near: PathBuf,
    /// What it printed before it was ready.
    lines: Vec<String>,
}

impl Holder {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tun-link"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut holder = Self {
            child,
            near: PathBuf::new(),
            lines: Vec::new(),
        };
        for line in output.lines() {
            let line = line.unwrap();
            if let Some(path) = line.strip_prefix("near ") {
                holder.near = path.into();
            }
            if line == "ready" {
                return holder;
            }
            holder.lines.push(line);
        }
        panic!("these tests take root: the holder did not start");
    }

    /// SIGKILL.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Both fail when it has been killed already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything on this machine that keeps the network namespace `inode`: processes inside, open
/// descriptors, mounts.
fn keepers(inode: u64) -> Vec<PathBuf> {
    let link = format!("net:[{inode}]");
    let is_it = |path: &Path| fs::read_link(path).is_ok_and(|to| to == Path::new(&link));
    let mut keepers = Vec::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let tasks = fs::read_dir(process.path().join("task"));
        let tasks = tasks.into_iter().flatten().flatten();
        let inside = tasks.map(|task| task.path().join("ns/net"));
        let open = fs::read_dir(process.path().join("fd"));
        let open = open.into_iter().flatten().flatten().map(|fd| fd.path());
        keepers.extend(inside.chain(open).filter(|path| is_it(path)));
        let mounts = fs::read_to_string(process.path().join("mountinfo"));
        if mounts.is_ok_and(|mounts| mounts.contains(&link)) {
            keepers.push(process.path().join("mountinfo"));
        }
    }
    keepers
}

/// The names in `/run/netns`.
fn names() -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn stopped_link_leaves_nothing() {
    let link = "delay 1ms".parse().unwrap();
    let link = TunLink::start(TunConfig::new(link, 1)).expect("these tests take root");
    let ends = [link.near(), link.far()];
    let inodes = ends.map(|end| fs::metadata(end.path()).unwrap().ino());
    assert_ne!(inodes[0], inodes[1]);
    assert!(!keepers(inodes[0]).is_empty());
    link.stop();
    for inode in inodes {
        assert_eq!(keepers(inode), Vec::<PathBuf>::new());
    }
}

#[test]
fn killed_owner_leaves_neither_namespace_nor_device() {
    let holder = Holder::start(&["delay 1ms"]);
    let inode = fs::metadata(&holder.near).unwrap().ino();
    assert!(!keepers(inode).is_empty());
    holder.kill();
    // A killed process is waited for before the last of its files is closed.
    let end = Instant::now() + PATIENCE;
    loop {
        let keepers = keepers(inode);
        if keepers.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "still kept by {keepers:?}");
        std::thread::yield_now();
    }
}

#[test]
fn device_goes_with_its_owner_though_others_keep_the_namespace() {
    let holder = Holder::start(&["delay 1ms"]);
    let namespace = File::open(&holder.near).unwrap();
    let devices = || {
        std::thread::scope(|scope| {
            let read = || {
                setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
                fs::read_to_string("/proc/thread-self/net/dev").unwrap()
            };
            scope.spawn(read).join().unwrap()
        })
    };
    assert!(devices().contains(hybridmig_netem::tun::DEVICE));
    holder.kill();
    let end = Instant::now() + PATIENCE;
    while devices().contains(hybridmig_netem::tun::DEVICE) {
        assert!(Instant::now() < end, "the device is still there");
        std::thread::yield_now();
    }
}

#[test]
fn name_lasts_as_long_as_its_owner() {
    in_private_run(|| {
        let namespace = Namespace::new().unwrap();
        let inode = fs::metadata(namespace.path()).unwrap().ino();
        let named = namespace.name("drop").unwrap();
        assert_eq!(named.name(), "hybridmig-drop");
        assert_eq!(names(), ["hybridmig-drop"]);
        assert_eq!(fs::metadata(named.path()).unwrap().ino(), inode);
        let taken = namespace.name("drop").unwrap_err();
        assert!(matches!(taken, NamespaceError::NameTaken { .. }), "{taken}");
        // Nor may anybody clean up what lives.
        assert_eq!(remove_stale().unwrap(), Vec::<String>::new());
        assert_eq!(names(), ["hybridmig-drop"]);
        drop(named);
        assert_eq!(names(), Vec::<String>::new());
        let kept = fs::read_dir("/run/hybridmig-netns").unwrap().count();
        assert_eq!(kept, 0);
        namespace.name("drop").unwrap();
        for name in ["", "a/b", "..", &"x".repeat(65)] {
            let error = namespace.name(name).unwrap_err();
            assert!(
                matches!(error, NamespaceError::InvalidName { .. }),
                "{error}"
            );
        }
    });
}

#[test]
fn names_of_a_killed_owner_go_at_the_next_start() {
    in_private_run(|| {
        let killed = Holder::start(&["delay 1ms", "killed"]);
        let alive = Holder::start(&["delay 1ms", "alive"]);
        assert_eq!(names().len(), 4);
        killed.kill();
        assert_eq!(names().len(), 4, "mounts outlive the process");
        // A foreign name with our prefix, and a foreign file.
        let foreign = Namespace::new().unwrap();
        let own = foreign.name("foreign").unwrap();
        fs::write("/run/netns/hybridmig-notes", "mine").unwrap();
        let next = Holder::start(&["delay 1ms", "killed"]);
        let mut removed = next.lines.clone();
        removed.retain(|line| line.starts_with("removed"));
        removed.sort();
        assert_eq!(
            removed,
            [
                "removed hybridmig-killed-far",
                "removed hybridmig-killed-near"
            ]
        );
        assert_eq!(
            names(),
            [
                "hybridmig-alive-far",
                "hybridmig-alive-near",
                "hybridmig-foreign",
                "hybridmig-killed-far",
                "hybridmig-killed-near",
                "hybridmig-notes",
            ]
        );
        drop(own);
        alive.kill();
        next.kill();
        let mut removed = remove_stale().unwrap();
        removed.sort();
        assert_eq!(removed.len(), 4);
        assert_eq!(names(), ["hybridmig-notes"]);
    });
}

#[test]
fn a_stale_record_takes_no_name_but_its_own() {
    in_private_run(|| {
        // A record of an owner that ended before it gave the name, while another namespace has it now.
        let other = Namespace::new().unwrap();
        drop(other.name("warm-up").unwrap());
        let path = Path::new("/run/netns/hybridmig-taken");
        File::create(path).unwrap();
        let flags = MsFlags::MS_BIND;
        mount(Some(&other.path()), path, None::<&str>, flags, None::<&str>).unwrap();
        let record = Path::new("/run/hybridmig-netns/hybridmig-taken");
        for text in ["", "1 2\n", "garbage", "18446744073709551616 7\n"] {
            fs::write(record, text).unwrap();
            remove_stale().unwrap();
            assert!(!record.exists(), "{text:?}");
            assert_eq!(names(), ["hybridmig-taken"], "{text:?}");
        }
        let error = Namespace::new().unwrap().name("taken").unwrap_err();
        assert!(matches!(error, NamespaceError::NameTaken { .. }), "{error}");
        assert_eq!(names(), ["hybridmig-taken"]);
    });
}
