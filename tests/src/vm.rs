//! A QEMU that runs the test guest under TCG, as a user would start it to have it migrated: RAM in a
//! shared file, a QMP monitor. It adds a second monitor for the fixture itself.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tempfile::TempDir;

use crate::console::{Console, Verified};
use crate::image::image;
use crate::keeper::Kept;
use crate::qmp::Qmp;

/// Length of a page of guest memory in bytes.
pub const PAGE: usize = 4096;

/// How long a monitor or a console may take to appear; a busy machine starts QEMU slowly.
const START: Duration = Duration::from_secs(30);

/// What to start.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// What the VM is called in messages.
    pub name: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// MiB of it that the checker fills and checks.
    pub checked_mib: u64,
    /// How fast the checker dirties pages, in MB/s.
    pub dirty_rate: f64,
    /// Per cent of the checked pages that get nine of ten writes; 100 is uniform.
    pub hot_percent: u32,
    /// More words for the kernel command line.
    pub kernel_arguments: String,
    /// Whether its image has real programs.
    pub programs: bool,
    /// Whether it waits for a migration (`-incoming defer`) instead of booting.
    pub incoming: bool,
    /// The QEMU to run.
    pub qemu: PathBuf,
    /// QEMU's machine type.
    pub machine: String,
    /// More arguments for QEMU.
    pub qemu_arguments: Vec<String>,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: "guest".to_owned(),
            memory_mib: 256,
            cpus: 1,
            checked_mib: 64,
            dirty_rate: 8.0,
            hot_percent: 100,
            kernel_arguments: String::new(),
            programs: false,
            incoming: false,
            qemu: "qemu-system-x86_64".into(),
            machine: "q35".to_owned(),
            qemu_arguments: Vec::new(),
        }
    }
}

impl VmConfig {
    /// The same VM, waiting for a migration.
    #[must_use]
    pub fn incoming(&self, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            incoming: true,
            ..self.clone()
        }
    }

    /// The whole command line, with RAM at `ram` and sockets at [`Sockets::within`] `directory`.
    pub fn command_line(&self, directory: &Path, ram: &Path) -> Result<Vec<OsString>> {
        let image = image(self.programs)?;
        let sockets = Sockets::within(directory);
        let socket = |path: &Path| format!("path={},server=on,wait=off", path.display());
        // A busy host may be too late for the kernel's test of its timer, which ends in a panic.
        let kernel_arguments = format!(
            "console=ttyS0 loglevel=4 panic=-1 no_timer_check memcheck.mb={} memcheck.rate={} memcheck.hot={} {}",
            self.checked_mib, self.dirty_rate, self.hot_percent, self.kernel_arguments
        );
        let machine = format!("{},accel=tcg,memory-backend=ram", self.machine);
        let memory = format!("{}M", self.memory_mib);
        let backend = format!(
            "memory-backend-file,id=ram,size={memory},mem-path={},share=on",
            ram.display()
        );
        let mut words: Vec<OsString> = vec![self.qemu.clone().into()];
        let mut add = |words_of_one: &[&str]| words.extend(words_of_one.iter().map(OsString::from));
        add(&[
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        add(&[
            "-name",
            &self.name,
            "-machine",
            &machine,
            "-smp",
            &self.cpus.to_string(),
        ]);
        add(&["-m", &memory, "-object", &backend]);
        add(&[
            "-chardev",
            &format!("socket,id=qmp,{}", socket(&sockets.qmp)),
        ]);
        add(&["-mon", "chardev=qmp,mode=control"]);
        add(&[
            "-chardev",
            &format!("socket,id=control,{}", socket(&sockets.control)),
        ]);
        add(&["-mon", "chardev=control,mode=control"]);
        add(&[
            "-chardev",
            &format!("socket,id=console,{}", socket(&sockets.console)),
        ]);
        add(&["-serial", "chardev:console"]);
        add(&["-append", &kernel_arguments]);
        // The guest must not say a word before somebody listens: the fixture lets it go.
        add(if self.incoming {
            &["-incoming", "defer"]
        } else {
            &["-S"]
        });
        words.extend(["-kernel".into(), image.kernel.into()]);
        words.extend(["-initrd".into(), image.initramfs.into()]);
        words.extend(self.qemu_arguments.iter().map(OsString::from));
        Ok(words)
    }
}

/// Where a VM's sockets are.
#[derive(Clone, Debug)]
pub struct Sockets {
    /// The monitor for hybridmig. QEMU serves one client at a time on it.
    pub qmp: PathBuf,
    /// The monitor for the fixture.
    pub control: PathBuf,
    /// The serial console.
    pub console: PathBuf,
}

impl Sockets {
    /// Their names in a directory.
    pub fn within(directory: &Path) -> Self {
        Self {
            qmp: directory.join("qmp"),
            control: directory.join("control"),
            console: directory.join("console"),
        }
    }
}

/// A running QEMU. Dropping it kills it and removes what it left.
#[derive(Debug)]
pub struct Vm {
    // In the order of dropping: the process first.
    qemu: Kept,
    console: Console,
    control: Qmp,
    ram: File,
    sockets: Sockets,
    stderr: PathBuf,
    _directory: TempDir,
}

impl Vm {
    /// Starts a VM. Unless it is an incoming one, its guest boots.
    pub fn start(config: &VmConfig) -> Result<Self> {
        Self::start_with(config, |_| ())
    }

    /// Like [`Self::start`]; `place` may change how QEMU is started, say in another network namespace.
    pub fn start_with(config: &VmConfig, place: impl FnOnce(&mut Command)) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("hybridmig-vm-")
            .tempdir()
            .context("no temporary directory")?;
        let ram = make_ram(config)?;
        let ram_path = PathBuf::from(format!("/proc/self/fd/{}", ram.as_raw_fd()));
        let words = config.command_line(directory.path(), &ram_path)?;
        let stderr = directory.path().join("stderr");
        let (program, arguments) = words.split_first().expect("QEMU is the first word");
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr).context("no file for QEMU's errors")?);
        inherit(&mut command, &ram);
        place(&mut command);
        let mut qemu = Kept::start(&config.name, command)?;
        let sockets = Sockets::within(directory.path());
        let connected = Qmp::connect(&sockets.control, START).and_then(|control| {
            let console = Console::connect(&config.name, &sockets.console, START)?;
            Ok((control, console))
        });
        let (control, console) = connected.with_context(|| {
            let said = fs::read_to_string(&stderr).unwrap_or_default();
            format!(
                "{}: QEMU ({:?}) says: {said}",
                config.name,
                qemu.has_ended()
            )
        })?;
        let mut vm = Self {
            qemu,
            console,
            control,
            ram,
            sockets,
            stderr,
            _directory: directory,
        };
        if !config.incoming {
            vm.control.execute("cont", serde_json::json!({}))?;
        }
        Ok(vm)
    }

    /// Starts a VM and waits until its checker has filled its pages and ticks.
    pub fn boot(config: &VmConfig) -> Result<Self> {
        let vm = Self::start(config)?;
        vm.console.wait_for("TICK ", Duration::from_secs(120))?;
        Ok(vm)
    }

    /// The monitor for hybridmig, `--qmp`.
    pub fn qmp_socket(&self) -> &Path {
        &self.sockets.qmp
    }

    /// The fixture's own monitor.
    pub fn control(&mut self) -> &mut Qmp {
        &mut self.control
    }

    /// The guest's console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    /// Has the guest verify all of its pages.
    pub fn verify(&self) -> Result<Verified> {
        self.console.verify(Duration::from_secs(120))
    }

    /// The guest's RAM, as the pager sees it: reads and writes are the guest's own bytes.
    pub fn ram(&self) -> &File {
        &self.ram
    }

    /// What QEMU has written to its standard error.
    pub fn stderr(&self) -> Result<String> {
        fs::read_to_string(&self.stderr).context("QEMU's errors cannot be read")
    }

    /// Kills QEMU with SIGKILL; the console's transcript stays.
    pub fn kill(&mut self) -> Result<()> {
        self.qemu.kill().map(|_| ())
    }
}

/// Numbers of the pages that differ in the RAM of two VMs, neither of which may be running.
pub fn differing_pages(a: &Vm, b: &Vm) -> Result<Vec<u64>> {
    let length = a.ram.metadata().context("RAM has a length")?.len();
    let other = b.ram.metadata().context("RAM has a length")?.len();
    ensure!(length == other, "RAM of {length} and of {other} bytes");
    let mut differing = Vec::new();
    let mut pages = (vec![0; PAGE], vec![0; PAGE]);
    for page in 0..length / PAGE as u64 {
        let at = page * PAGE as u64;
        a.ram
            .read_exact_at(&mut pages.0, at)
            .context("RAM can be read")?;
        b.ram
            .read_exact_at(&mut pages.1, at)
            .context("RAM can be read")?;
        if pages.0 != pages.1 {
            differing.push(page);
        }
    }
    Ok(differing)
}

/// RAM in a memfd: named for QEMU by its number, and gone with the last process that has it.
fn make_ram(config: &VmConfig) -> Result<File> {
    let fd = memfd_create("hybridmig-test-ram", MFdFlags::MFD_CLOEXEC);
    let file = File::from(fd.context("no memfd")?);
    let length = config.memory_mib << 20;
    file.set_len(length)
        .with_context(|| format!("no {length} bytes of RAM"))?;
    Ok(file)
}

/// Lets the child have `file` under the same number. The parent's own stays close-on-exec, so no
/// other child gets it.
fn inherit(command: &mut Command, file: &File) {
    let fd = file.as_raw_fd();
    // SAFETY: fcntl is async-signal-safe and the closure allocates nothing. The descriptor is open
    // when the child is forked: the caller keeps `file` until after the start.
    unsafe {
        command.pre_exec(move || {
            let fd = BorrowedFd::borrow_raw(fd);
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map_err(io::Error::from)?;
            Ok(())
        });
    }
}
