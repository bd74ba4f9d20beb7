//! Formats and rules, against what Xen's own toolstack wrote.

use std::path::Path;

use hybridmig_pager::xen::Span;
use hybridmig_pager::xen::ring::PARAM_PAGING_RING;
use hybridmig_transport::message::{RegionInfo, RegionKind};
use proptest::prelude::*;

use super::config::Config;
use super::facts::Facts;
use super::spans::{MAX_RUNS, Spans};
use super::stream::{Prelude, StreamError, Tail};
use crate::blocks::{BlockSet, RegionId};
use crate::guest::qemu::disk::DiskOption;

/// What `xl save` of Xen 4.17 wrote of a PVH domain of 128 MiB, without its PAGE_DATA records; see docs/xen.md.
const RECORDED: &[u8] = include_bytes!("recorded/pvh-4.17.save");
/// Where the state begins in it: a TSC_INFO record follows the static data.
const HEAD: &[u8] = &[8, 0, 0, 0, 24, 0, 0, 0];

fn recorded() -> (&'static [u8], &'static [u8]) {
    let at = RECORDED.windows(8).position(|bytes| bytes == HEAD);
    RECORDED.split_at(at.expect("a TSC_INFO record"))
}

/// A body in the recording, by its head.
fn body(of: &[u8], kind: u32) -> Vec<u8> {
    let mut at = 0;
    while let Some(head) = of.get(at..at + 8) {
        let word = |from: usize| u32::from_le_bytes(head[from..from + 4].try_into().unwrap());
        let len = word(4) as usize;
        if word(0) == kind {
            return of[at + 8..at + 8 + len].to_vec();
        }
        at += 8 + len.next_multiple_of(8);
    }
    panic!("no record of type {kind:#x}");
}

fn recorded_prelude() -> Prelude {
    let (first, _) = recorded();
    let len = u32::from_le_bytes(first[48..52].try_into().unwrap()) as usize;
    assert_eq!(first[51 + len], 0, "the configuration ends as a C string");
    let config = String::from_utf8(first[52..51 + len].to_vec()).unwrap();
    // The headers of libxl's and libxc's stream have 16 + 8 and 24 + 16 bytes.
    let records = &first[52 + len + 64..];
    Prelude {
        config,
        cpuid: body(records, 0x11),
        msrs: body(records, 0x12),
        xen: (4, 17),
        populated: vec![],
    }
}

#[test]
fn the_prelude_is_what_xl_writes() {
    assert_eq!(recorded_prelude().bytes(), recorded().0);
}

#[test]
fn the_state_is_what_xl_writes() {
    let tail = Tail::parse(recorded().1).unwrap();
    assert_eq!(tail.bytes(), recorded().1);
    assert!(tail.context.len() > 2000, "{}", tail.context.len());
    assert!(
        tail.params
            .iter()
            .any(|(param, _)| *param == PARAM_PAGING_RING)
    );
}

#[test]
fn pages_are_announced_without_data() {
    let none = recorded_prelude().bytes();
    let some = Prelude {
        populated: vec![0..1500, 0xf_eff8..0xf_effa],
        ..recorded_prelude()
    };
    let bytes = some.bytes();
    assert_eq!(bytes[..none.len()], none);
    let first = &bytes[none.len()..];
    assert_eq!(
        first[..16],
        [1, 0, 0, 0, 8, 32, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        first[16..32],
        [0, 0, 0, 0, 0, 0, 0, 0xe0, 1, 0, 0, 0, 0, 0, 0, 0xe0]
    );
    let second = &first[16 + 1024 * 8..];
    assert_eq!(second.len(), 16 + (1502 - 1024) * 8);
    assert_eq!(
        second[second.len() - 8..],
        (0xe << 60 | 0xf_eff9_u64).to_le_bytes()
    );
}

/// `docs/specs/libxl-migration-stream.pandoc`: EMULATOR_CONTEXT has type 3, and a QEMU has number 2.
#[test]
fn the_state_of_a_device_model_is_between_the_ends() {
    let plain = Tail::parse(recorded().1).unwrap();
    let with = |emulator: &[u8]| Tail {
        emulator: Some(emulator.to_vec()),
        ..plain.clone()
    };
    let bytes = with(b"QEVMstate").bytes();
    let until = recorded().1.len() - 8;
    assert_eq!(bytes[..until], recorded().1[..until]);
    assert_eq!(
        bytes[until..],
        *b"\x03\0\0\0\x11\0\0\0\x02\0\0\0\0\0\0\0QEVMstate\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(Tail::parse(&bytes), Ok(with(b"QEVMstate")));
    let none = with(&[]).bytes();
    assert_eq!(Tail::parse(&none), Err(StreamError::Length(3, 8)));
    let mut other = bytes.clone();
    other[until + 8] = 1;
    assert!(Tail::parse(&other).is_err(), "another emulator");
    assert!(Tail::parse(&bytes[..bytes.len() - 16]).is_err());
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let good = recorded().1;
    assert_eq!(Tail::parse(&[]), Err(StreamError::Short(0)));
    assert!(matches!(
        Tail::parse(&good[..good.len() - 8]),
        Err(StreamError::Short(_))
    ));
    let longer = [good, &[0; 8]].concat();
    assert!(matches!(Tail::parse(&longer), Err(StreamError::Length(..))));
    let mut other = good.to_vec();
    other[0] = 1;
    assert_eq!(Tail::parse(&other), Err(StreamError::Record(1, "TSC_INFO")));
}

proptest! {
    #[test]
    fn any_bytes_are_a_state_or_an_error(at in 0..RECORDED.len(), byte: u8, cut in 0..RECORDED.len()) {
        let mut bytes = recorded().1.to_vec();
        let len = bytes.len();
        bytes[at % len] = byte;
        bytes.truncate(cut);
        if let Ok(tail) = Tail::parse(&bytes) {
            prop_assert_eq!(Tail::parse(&tail.bytes()), Ok(tail));
        }
    }
}

fn span(first: u64, blocks: u32) -> Span {
    Span { first, blocks }
}

#[test]
fn runs_are_cut_where_pages_are_special_and_the_ring_is_left_out() {
    let spans = Spans::of_runs(
        &[
            0..0x8000,
            0xe_fff0..0xf_0010,
            0xf_eff8..0xf_f000,
            0x10_0000..0x10_0100,
        ],
        0xf_effa,
    );
    let spans = spans.unwrap();
    let wanted = [
        span(0, 0x8000),
        span(0xe_fff0, 0x10),
        span(0xf_0000, 0x10),
        span(0xf_eff8, 2),
        span(0xf_effb, 5),
        span(0x10_0000, 0x100),
    ];
    assert_eq!(spans.spans(), wanted);
    assert_eq!(Spans::of_regions(&spans.regions()), Ok(spans.clone()));
    assert_eq!(spans.pages(), 0x8000 + 0x10 + 0x10 + 7 + 0x100);
    assert!(spans.covers(0x10_00ff) && !spans.covers(0xf_effa) && !spans.covers(0x9000));
    let special: Vec<u16> = spans.special().iter().map(|(region, _)| region.0).collect();
    assert_eq!(special, [2, 3, 4]);
    let dirty: BlockSet = [0, 0x7fff, 0x8000, 0xf_effa, 0xf_effb, 0x10_0001]
        .into_iter()
        .collect();
    let blocks: Vec<_> = spans.blocks(&dirty).iter_blocks().collect();
    let at = |region, block| (RegionId(region), block);
    assert_eq!(blocks, [at(0, 0), at(0, 0x7fff), at(4, 0), at(5, 1)]);
    assert_eq!(spans.gfn(RegionId(5), 1), Some(0x10_0001));
    assert_eq!(spans.gfn(RegionId(5), 0x100), None);
}

#[test]
fn memory_in_too_many_pieces_is_refused_with_what_to_do() {
    let runs: Vec<_> = (0..=MAX_RUNS as u64).map(|n| 2 * n..2 * n + 1).collect();
    assert!(Spans::of_runs(&runs, 0).unwrap_err().contains("mem-set"));
    assert!(Spans::of_runs(&[], 0).is_err());
}

#[test]
fn regions_that_are_no_runs_are_refused() {
    let region = |name: &str, blocks, block_size, kind| RegionInfo {
        id: RegionId(0),
        kind,
        name: name.into(),
        blocks,
        block_size,
    };
    let memory = RegionKind::Memory;
    for wrong in [
        region("ram", 1, 4096, memory),
        region("gfn-x", 1, 4096, memory),
        region("gfn-ffffffffffffffff", 1, 4096, memory),
        region("gfn-0", 0, 4096, memory),
        region("gfn-0", 1, 65536, memory),
        region("gfn-0", 1, 4096, RegionKind::Disk),
    ] {
        assert!(
            Spans::of_regions(std::slice::from_ref(&wrong)).is_err(),
            "{wrong:?}"
        );
    }
    let (first, second) = (
        region("gfn-0", 2, 4096, memory),
        region("gfn-1", 2, 4096, memory),
    );
    assert!(Spans::of_regions(&[first, second]).is_err(), "they overlap");
}

fn config(change: impl Fn(&mut serde_json::Value)) -> Config {
    let mut value: serde_json::Value = serde_json::from_str(&recorded_prelude().config).unwrap();
    change(&mut value);
    Config::parse(&value.to_string()).unwrap()
}

#[test]
fn what_cannot_move_is_refused_by_name() {
    let plain = config(|_| {});
    assert_eq!(plain.objections(), [""; 0]);
    assert_eq!((plain.name(), plain.kind()), ("guest", "pvh"));
    assert_eq!(plain.renamed("guest--incoming").name(), "guest--incoming");
    let with = |kind: &str| config(|value| value[kind] = serde_json::json!([{}])).objections();
    assert!(with("p9s")[0].contains("9pfs shares (1)"));
    assert!(with("pcidevs")[0].contains("PCI"));
    let of_type = |kind: &str| config(|value| value["c_info"]["type"] = kind.into()).objections();
    assert!(of_type("pv")[0].contains("page tables"));
    assert_eq!(of_type("hvm"), [""; 0]);
    for (key, value) in [
        ("device_model_version", "qemu_xen_traditional"),
        ("device_model_stubdomain", "True"),
        ("dm_restrict", "True"),
    ] {
        let model = config(|config| {
            config["c_info"]["type"] = "hvm".into();
            config["b_info"][key] = value.into();
        });
        let found = model.objections();
        assert!(
            matches!(&found[..], [one] if one.contains("device model")),
            "{key}: {found:?}"
        );
    }
}

/// A disk and two network interfaces, as `xl list -l` of Xen 4.17 shows them.
fn with_devices(change: impl Fn(&mut serde_json::Value)) -> Config {
    config(|value| {
        value["disks"] = serde_json::json!([
            {"pdev_path": "/dev/vg/root", "vdev": "xvda", "backend": "phy", "format": "raw", "readwrite": 1}
        ]);
        value["nics"] = serde_json::json!([
            {"devid": 0, "mac": "00:16:3e:00:00:01", "bridge": "xenbr0", "script": "/etc/xen/scripts/vif-bridge"},
            {"devid": 1, "mac": "00:16:3e:00:00:02", "script": "vif-route"}
        ]);
        change(value);
    })
}

#[test]
fn disks_move_only_where_they_are_said_to_be_shared() {
    let guest = with_devices(|_| {});
    assert_eq!(guest.objections(), [""; 0]);
    let choice = |words: &[&str]| {
        words
            .iter()
            .map(|word| word.parse::<DiskOption>().unwrap())
            .collect()
    };
    for unsaid in [
        &[][..],
        &["xvdb=skip"],
        &["all=copy"],
        &["all=skip", "xvda=0.5"],
    ] {
        let found = guest.unshared(&choice(unsaid));
        assert!(
            matches!(&found[..], [one] if one.contains("/dev/vg/root") && one.contains("--disk xvda=skip")),
            "{unsaid:?}: {found:?}"
        );
    }
    for said in [&["xvda=skip"][..], &["all=skip"]] {
        assert_eq!(guest.unshared(&choice(said)), [""; 0]);
    }
}

#[test]
fn what_devices_lie_on_is_looked_for_where_they_come() {
    let lacking = |guest: &Config, there: &[&str]| {
        guest.lacking(|path| there.iter().any(|it| path == Path::new(it)))
    };
    let guest = with_devices(|_| {});
    let all = ["/dev/vg/root", "/sys/class/net/xenbr0/bridge"];
    assert_eq!(lacking(&guest, &all), [""; 0]);
    assert!(matches!(&lacking(&guest, &all[1..])[..], [one] if one.contains("disk xvda")));
    assert!(matches!(&lacking(&guest, &all[..1])[..], [one] if one.contains("'xenbr0'")));
    let usual = with_devices(|value| {
        value["disks"][0]["script"] = "/etc/xen/scripts/block".into();
    });
    assert_eq!(lacking(&usual, &all[1..]).len(), 1);
    // Only a script knows what these mean.
    let scripted = with_devices(|value| {
        value["disks"][0]["script"] = "block-iscsi".into();
        value["nics"][0]["script"] = "vif-openvswitch".into();
    });
    assert_eq!(lacking(&scripted, &[]), [""; 0]);
    let hostile = with_devices(|value| value["nics"][0]["bridge"] = "../../../root".into());
    assert_eq!(hostile.lacking(|_| true).len(), 1);
}

#[test]
fn driver_domains_keep_their_devices() {
    for (kind, key, value) in [
        ("disks", "backend_domname", serde_json::json!("storage")),
        ("nics", "backend_domid", serde_json::json!(3)),
    ] {
        let found = with_devices(|config| config[kind][0][key] = value.clone()).objections();
        assert!(
            matches!(&found[..], [one] if one.contains("driver domain")),
            "{found:?}"
        );
    }
    let named = with_devices(|config| config["disks"][0]["backend_domname"] = "0".into());
    assert_eq!(named.objections(), [""; 0]);
}

#[test]
fn a_listing_names_one_domain() {
    let listed = format!(
        r#"[{{"domid": 7, "config": {}}}]"#,
        recorded_prelude().config
    );
    let (id, found) = Config::of_list(&listed).unwrap();
    assert_eq!((id, found.name()), (7, "guest"));
    for wrong in [
        "",
        "[]",
        "{}",
        r#"[{"config": {}}]"#,
        r#"[{"domid": 1, "config": {}}]"#,
    ] {
        assert!(Config::of_list(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn facts_survive_the_offer() {
    let facts = Facts {
        config: "{}".into(),
        cpuid: vec![0, 0xff, 0x1a],
        msrs: vec![],
        xen: (4, 17),
        ring: 0xf_effa,
        vcpus: 2,
    };
    let mut map = facts.to_map();
    assert_eq!(Facts::of_map(&map), Ok(facts));
    map.insert("cpuid".into(), "0ff".into());
    assert!(Facts::of_map(&map).unwrap_err().contains("cpuid"));
    map.insert("cpuid".into(), "é0".into());
    assert!(Facts::of_map(&map).is_err());
    map.remove("vcpus");
    map.insert("cpuid".into(), "00".repeat(64 << 10));
    assert!(Facts::of_map(&map).unwrap_err().contains("bytes"));
}
