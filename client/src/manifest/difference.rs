//! What must be done so that a VM is as a document describes it. Pure.

use std::collections::{BTreeMap, HashMap};

use uncloud_proto::v1;

use super::{Desired, Document, Nic};
use crate::{output::text::word, units};

/// The ids of images by what a document calls them.
pub type Images = BTreeMap<String, String>;

/// What must be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// There is no such VM: it is created.
    Create(Box<v1::CreateVmRequest>),
    /// It is changed. Both may be absent: it is as it should be.
    Change {
        /// What is different, for people.
        changes: Vec<Change>,
        /// The fields to change.
        update: Option<Box<v1::UpdateVmRequest>>,
        /// Start it or stop it.
        power: Option<Desired>,
    },
    /// It cannot be made so.
    Impossible {
        /// The fields that cannot be changed, with what they are and should be.
        changes: Vec<Change>,
    },
}

/// A field that is different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its name in the document.
    pub field: String,
    /// What it is.
    pub from: String,
    /// What it should be.
    pub to: String,
}

/// Plans what must be done. `images` has every image that the document names, if `vm` is there.
#[must_use]
pub fn plan(document: &Document, default_owner: &str, vm: Option<&v1::Vm>, images: &Images) -> Plan {
    let Some(vm) = vm else { return Plan::Create(Box::new(document.create_request(default_owner))) };
    let now = vm.spec.clone().unwrap_or_default();
    let next = vm.next_spec.clone().unwrap_or_else(|| now.clone());

    let mut fixed = Vec::new();
    compare_fixed(document, &next, images, &mut fixed);
    if !fixed.is_empty() {
        return Plan::Impossible { changes: fixed };
    }

    let mut diff = Diff::default();
    diff.labels(document, vm);
    let spec = &mut v1::VmSpec::default();
    diff.field("cpus", "spec.vcpus", next.vcpus, document.cpus, |v| {
        spec.vcpus = v;
    });
    let memory = document.memory.map(|m| m.0);
    diff.shown("memory", "spec.memory_mib", next.memory_mib, memory, mib, |v| spec.memory_mib = v);
    diff.word(
        "restart",
        "spec.restart",
        next.restart(),
        document.restart.map(|w| w.to_proto()),
        "RESTART_POLICY_",
        |v| {
            spec.restart = v.into();
        },
    );
    let failover = document.failover.map(|w| w.to_proto());
    diff.word("failover", "spec.failover", next.failover(), failover, "FAILOVER_POLICY_", |v| spec.failover = v.into());
    let loss = document.on_disk_loss.map(|w| w.to_proto());
    diff.word("on_disk_loss", "spec.on_disk_loss", next.on_disk_loss(), loss, "DISK_LOSS_POLICY_", |v| {
        spec.on_disk_loss = v.into();
    });
    diff.field("priority", "spec.priority", next.priority, document.priority, |v| spec.priority = v);
    let grace = document.stop_grace.map(|s| s.0);
    diff.shown(
        "stop_grace",
        "spec.stop_grace_seconds",
        next.stop_grace_seconds,
        grace,
        |s| format!("{s}s"),
        |v| {
            spec.stop_grace_seconds = v;
        },
    );
    let display = document.display.map(|w| w.to_proto());
    diff.word("display", "spec.display", next.display(), display, "DISPLAY_TYPE_", |v| spec.display = v.into());
    let agent = document.guest_agent.map(|w| w.to_proto());
    diff.word("guest_agent", "spec.guest_agent", next.guest_agent(), agent, "GUEST_AGENT_MODE_", |v| {
        spec.guest_agent = v.into();
    });
    let cpu = document.cpu.map(|w| w.to_proto());
    diff.word("cpu", "spec.cpu", next.cpu(), cpu, "CPU_MODEL_", |v| spec.cpu = v.into());

    let Diff { mut changes, paths, labels } = diff;
    let power = document.desired.filter(|d| d.to_proto() != vm.desired());
    if let Some(power) = power {
        let from = crate::output::text::word(vm.desired().as_str_name(), "POWER_STATE_");
        changes.push(Change { field: "desired".to_owned(), from, to: power.to_string() });
    }
    let update = (!paths.is_empty()).then(|| {
        Box::new(v1::UpdateVmRequest {
            vm: vm.id.clone(),
            owner: vm.owner.clone(),
            revision: vm.revision,
            update_mask: Some(prost_types::FieldMask { paths }),
            labels,
            spec: Some(spec.clone()),
        })
    });
    Plan::Change { changes, update, power }
}

#[derive(Default)]
struct Diff {
    changes: Vec<Change>,
    paths: Vec<String>,
    labels: HashMap<String, String>,
}

impl Diff {
    fn note(&mut self, field: &str, path: &str, from: String, to: String) {
        self.changes.push(Change { field: field.to_owned(), from, to });
        self.paths.push(path.to_owned());
    }

    fn labels(&mut self, document: &Document, vm: &v1::Vm) {
        let Some(wanted) = &document.labels else { return };
        let wanted: HashMap<String, String> = wanted.clone().into_iter().collect();
        if wanted != vm.labels {
            self.note(
                "labels",
                "labels",
                crate::output::text::labels(&vm.labels),
                crate::output::text::labels(&wanted),
            );
            self.labels = wanted;
        }
    }

    fn shown<T: PartialEq + Copy>(
        &mut self,
        field: &str,
        path: &str,
        from: T,
        to: Option<T>,
        show: impl Fn(T) -> String,
        set: impl FnOnce(T),
    ) {
        if let Some(to) = to.filter(|to| *to != from) {
            self.note(field, path, show(from), show(to));
            set(to);
        }
    }

    fn field<T>(&mut self, field: &str, path: &str, from: T, to: Option<T>, set: impl FnOnce(T))
    where
        T: PartialEq + Copy + ToString,
    {
        self.shown(field, path, from, to, |v| v.to_string(), set);
    }

    fn word<T>(&mut self, field: &str, path: &str, from: T, to: Option<T>, prefix: &str, set: impl FnOnce(T))
    where
        T: PartialEq + Copy + Named,
    {
        self.shown(field, path, from, to, |v| crate::output::text::word(v.name(), prefix), set);
    }
}

/// An enum of the API, by its name there.
trait Named {
    fn name(&self) -> &'static str;
}

macro_rules! named {
    ($($kind:ident),*) => { $(impl Named for v1::$kind { fn name(&self) -> &'static str { self.as_str_name() } })* };
}

named!(RestartPolicy, FailoverPolicy, DiskLossPolicy, DisplayType, GuestAgentMode, CpuModel);

/// What `UpdateVm` cannot change.
fn compare_fixed(document: &Document, now: &v1::VmSpec, images: &Images, changes: &mut Vec<Change>) {
    let mut differ = |field: &str, from: String, to: Option<String>| {
        if let Some(to) = to.filter(|to| *to != from) {
            changes.push(Change { field: field.to_owned(), from, to });
        }
    };
    let image = |name: &String| images.get(name).unwrap_or(name).clone();
    differ("machine", now.machine.clone(), document.machine.map(|m| m.name().to_owned()));
    let kernel = now.kernel.clone().unwrap_or_default();
    let wanted = document.kernel.as_ref();
    differ("kernel.image", kernel.image, wanted.map(|k| image(&k.image)));
    differ("kernel.append", kernel.command_line, wanted.and_then(|k| k.append.clone()));
    if let Some(disks) = &document.disks {
        // What is detached is kept, and no part of what the document describes.
        let has: Vec<&v1::Disk> = now.disks.iter().filter(|d| crate::output::is_in_machine(d)).collect();
        differ("disks", format!("{} disks", has.len()), Some(format!("{} disks", disks.len())));
        for (i, (disk, is)) in disks.iter().zip(has).enumerate() {
            let at = |field: &str| format!("disks[{i}].{field}");
            let name = disk.name.clone().unwrap_or_else(|| format!("disk{i}"));
            differ(&at("name"), is.name.clone(), Some(name));
            differ(&at("pool"), is.pool.clone(), Some(disk.pool.clone().unwrap_or_else(|| "default".to_owned())));
            differ(&at("size"), units::bytes(is.size_bytes), disk.size.map(|s| units::bytes(s.0)));
            let bus = |b: v1::DiskBus| word(b.as_str_name(), "DISK_BUS_");
            let cache = |c: v1::DiskCache| word(c.as_str_name(), "DISK_CACHE_");
            differ(&at("bus"), bus(is.bus()), disk.bus.map(|b| bus(b.to_proto())));
            differ(&at("cache"), cache(is.cache()), disk.cache.map(|c| cache(c.to_proto())));
            differ(&at("image"), is.image.clone(), Some(disk.image.as_ref().map(image).unwrap_or_default()));
        }
    }
    if let Some(nics) = &document.nics {
        let words = |nics: &mut dyn Iterator<Item = v1::Nic>| {
            nics.map(|n| crate::output::nic(&n)).collect::<Vec<_>>().join(", ")
        };
        let wanted = words(&mut nics.iter().map(Nic::to_proto));
        differ("nics", words(&mut now.nics.iter().cloned()), Some(wanted));
    }
    let host_labels = document.host_labels.as_ref().map(|l| l.clone().into_iter().collect::<HashMap<_, _>>());
    differ(
        "host_labels",
        crate::output::text::labels(&now.host_labels),
        host_labels.map(|l| crate::output::text::labels(&l)),
    );
    differ(
        "firmware",
        crate::output::text::word(now.firmware().as_str_name(), "FIRMWARE_"),
        document.firmware.map(|f| crate::output::text::word(f.to_proto().as_str_name(), "FIRMWARE_")),
    );
    let told = |c: &v1::CloudInit| crate::output::cloud_init(c);
    if let Some(wanted) = document.cloud_init.as_ref().map(super::CloudInit::to_proto)
        && now.cloud_init.as_ref() != Some(&wanted)
    {
        let from = now.cloud_init.as_ref().map_or_else(|| "none".to_owned(), told);
        // What is told may look the same and differ in the texts themselves.
        differ("cloud_init", from, Some(format!("{} (changed)", told(&wanted))));
    }
    differ("anti_affinity", now.anti_affinity_group.clone(), document.anti_affinity.clone());
}

fn mib(n: u64) -> String {
    crate::output::text::mib(n)
}

#[cfg(test)]
mod tests {
    use super::{super::parse, *};

    fn vm() -> v1::Vm {
        let spec = v1::VmSpec {
            vcpus: 1,
            memory_mib: 512,
            machine: "q35".into(),
            disks: vec![v1::Disk {
                name: "disk0".into(),
                pool: "default".into(),
                size_bytes: 1 << 30,
                image: "uuid-of-debian".into(),
                bus: v1::DiskBus::Virtio.into(),
                cache: v1::DiskCache::None.into(),
                ..Default::default()
            }],
            restart: v1::RestartPolicy::OnFailure.into(),
            failover: v1::FailoverPolicy::Fast.into(),
            on_disk_loss: v1::DiskLossPolicy::Wait.into(),
            stop_grace_seconds: 60,
            display: v1::DisplayType::Standard.into(),
            guest_agent: v1::GuestAgentMode::Enabled.into(),
            ..Default::default()
        };
        v1::Vm {
            id: "uuid".into(),
            name: "web".into(),
            owner: "me".into(),
            spec: Some(spec),
            desired: v1::PowerState::Running.into(),
            revision: 7,
            ..Default::default()
        }
    }

    fn plan_for(text: &str, vm: &v1::Vm) -> Plan {
        let images = [("debian".to_owned(), "uuid-of-debian".to_owned())].into();
        plan(&parse(text).unwrap()[0], "me", Some(vm), &images)
    }

    const SAME: &str =
        "name: web\nmemory: 512M\ndisks: [{image: debian, size: 1G}]\nrestart: on-failure\ndesired: running\n";

    #[test]
    fn what_is_as_described_needs_nothing() {
        assert_eq!(plan_for(SAME, &vm()), Plan::Change { changes: vec![], update: None, power: None });
        assert_eq!(plan_for("name: web\n", &vm()), Plan::Change { changes: vec![], update: None, power: None });
    }

    #[test]
    fn what_is_different_is_changed_and_nothing_else() {
        let text = "name: web\nmemory: 1G\ncpus: 1\nlabels: {a: b}\nfailover: hold\nstop_grace: 5s\ndesired: stopped\n";
        let Plan::Change { changes, update, power } = plan_for(text, &vm()) else { panic!() };
        let fields: Vec<_> = changes.iter().map(|c| format!("{} {} > {}", c.field, c.from, c.to)).collect();
        assert_eq!(
            fields,
            [
                "labels  > a=b",
                "memory 512 MiB > 1 GiB",
                "failover fast > hold",
                "stop_grace 60s > 5s",
                "desired running > stopped"
            ]
        );
        let update = update.unwrap();
        let paths = update.update_mask.as_ref().unwrap().paths.clone();
        assert_eq!(paths, ["labels", "spec.memory_mib", "spec.failover", "spec.stop_grace_seconds"]);
        assert_eq!((update.revision, update.vm.as_str(), power), (7, "uuid", Some(Desired::Stopped)));
        let spec = update.spec.as_ref().unwrap();
        assert_eq!((spec.memory_mib, spec.vcpus, spec.stop_grace_seconds), (1024, 0, 5));
        assert_eq!(spec.failover(), v1::FailoverPolicy::Hold);
    }

    #[test]
    fn what_waits_for_the_next_start_is_not_asked_for_again() {
        let mut vm = vm();
        let mut next = vm.spec.clone().unwrap();
        next.memory_mib = 1024;
        vm.next_spec = Some(next);
        let Plan::Change { changes, .. } = plan_for("name: web\nmemory: 1G\n", &vm) else { panic!() };
        assert_eq!(changes, []);
        let Plan::Change { changes, .. } = plan_for("name: web\nmemory: 512M\n", &vm) else { panic!() };
        assert_eq!(changes[0].field, "memory", "it is taken back");
    }

    #[test]
    fn what_cannot_be_changed_is_said_and_nothing_is_done() {
        let text = "name: web\nmemory: 1G\nmachine: pc\ndisks: [{image: other, size: 2G}]\nnics: [{type: user}]\n";
        let Plan::Impossible { changes } = plan_for(text, &vm()) else { panic!() };
        let fields: Vec<_> = changes.iter().map(|c| c.field.as_str()).collect();
        assert_eq!(fields, ["machine", "disks[0].size", "disks[0].image", "nics"]);
    }

    #[test]
    fn what_is_not_there_is_created() {
        let documents = parse(SAME).unwrap();
        let Plan::Create(request) = plan(&documents[0], "me", None, &Images::new()) else { panic!() };
        assert_eq!((request.name.as_str(), request.owner.as_str()), ("web", "me"));
    }
}
