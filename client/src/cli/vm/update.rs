//! `uncloud vm update`: changes what a VM is made of.

use clap::Args;
use uncloud_proto::v1;

use super::{
    super::{Context, Error},
    create::{Cpu, Display, Failover, GuestAgent, Restart},
};
use crate::{output, units};

#[derive(Debug, Args)]
#[command(
    after_help = "CPUs and their model, memory, failover, display and guest agent change when the VM is next started after it \
                        has stopped: `uncloud vm stop`, then `uncloud vm start`. A restart does not do it."
)]
pub(crate) struct Arguments {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// Virtual CPUs.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256), value_name = "N")]
    cpus: Option<u32>,
    /// Memory, such as 512M or 2G.
    #[arg(long, value_parser = units::parse_mib, value_name = "SIZE")]
    memory: Option<u64>,
    /// What happens when QEMU dies or the guest panics.
    #[arg(long, value_enum)]
    restart: Option<Restart>,
    /// What happens when the host dies.
    #[arg(long, value_enum)]
    failover: Option<Failover>,
    /// VMs with a higher priority start first; 0 to 1000.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=1000), value_name = "N")]
    priority: Option<u32>,
    /// How long the guest may take to power down before it is killed.
    #[arg(long, value_parser = units::parse_seconds, value_name = "DURATION")]
    stop_grace: Option<u32>,
    /// Its screen.
    #[arg(long, value_enum)]
    display: Option<Display>,
    /// A channel to a guest agent.
    #[arg(long, value_enum)]
    guest_agent: Option<GuestAgent>,
    /// The CPU that the guest sees.
    #[arg(long, value_enum)]
    cpu: Option<Cpu>,
    /// A label to set. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = units::parse_pair)]
    label: Vec<(String, String)>,
    /// A label to remove. May be repeated.
    #[arg(long, value_name = "KEY")]
    remove_label: Vec<String>,
    /// Refuses if somebody has changed the VM since it was read at this revision.
    #[arg(long, value_name = "REVISION", value_parser = clap::value_parser!(i64).range(1..))]
    if_revision: Option<i64>,
}

pub(crate) async fn run(context: &Context, a: Arguments) -> Result<(), Error> {
    let labels = !a.label.is_empty() || !a.remove_label.is_empty();
    let mut request = request(&a, &context.owner);
    if labels {
        // All labels are one field, so the others must be read first.
        let get = v1::GetVmRequest { vm: a.vm.clone(), owner: context.owner.clone() };
        let vm = context.client.get_vm(get).await?.vm.unwrap_or_default();
        request.labels = vm.labels;
        for key in &a.remove_label {
            request.labels.remove(key);
        }
        request.labels.extend(a.label);
        if request.revision == 0 {
            request.revision = vm.revision;
        }
        request.update_mask.get_or_insert_default().paths.push("labels".to_owned());
    }
    if request.update_mask.as_ref().is_none_or(|mask| mask.paths.is_empty()) {
        return Err(Error::Usage("nothing to change: give at least one of the options".to_owned()));
    }
    let answer = context.client.update_vm(request).await?;
    note_pending(answer.vm.as_ref());
    context.print(&answer, |a| super::row(context, a.vm.as_ref()))
}

/// Says what has not changed yet.
pub(crate) fn note_pending(vm: Option<&v1::Vm>) {
    if let Some(vm) = vm.filter(|vm| !vm.pending_restart.is_empty()) {
        let (fields, name) = (vm.pending_restart.join(", "), &vm.name);
        output::note(&output::clean(&format!(
            "From the next start on: {fields} (`uncloud vm stop --wait {name}`, then `uncloud vm start {name}`)."
        )));
    }
}

fn request(a: &Arguments, owner: &str) -> v1::UpdateVmRequest {
    let mut spec = v1::VmSpec::default();
    let mut paths = Vec::new();
    let mut name = |path: &str| paths.push(format!("spec.{path}"));
    if let Some(cpus) = a.cpus {
        spec.vcpus = cpus;
        name("vcpus");
    }
    if let Some(memory) = a.memory {
        spec.memory_mib = memory;
        name("memory_mib");
    }
    if let Some(restart) = a.restart {
        spec.restart = restart.to_proto().into();
        name("restart");
    }
    if let Some(failover) = a.failover {
        let (failover, loss) = failover.to_proto();
        spec.failover = failover.into();
        spec.on_disk_loss = loss.into();
        name("failover");
        name("on_disk_loss");
    }
    if let Some(priority) = a.priority {
        spec.priority = priority;
        name("priority");
    }
    if let Some(grace) = a.stop_grace {
        spec.stop_grace_seconds = grace;
        name("stop_grace_seconds");
    }
    if let Some(display) = a.display {
        spec.display = display.to_proto().into();
        name("display");
    }
    if let Some(agent) = a.guest_agent {
        spec.guest_agent = agent.to_proto().into();
        name("guest_agent");
    }
    if let Some(cpu) = a.cpu {
        spec.cpu = cpu.to_proto().into();
        name("cpu");
    }
    v1::UpdateVmRequest {
        vm: a.vm.clone(),
        owner: owner.to_owned(),
        revision: a.if_revision.unwrap_or(0),
        update_mask: Some(prost_types::FieldMask { paths }),
        labels: Default::default(),
        spec: Some(spec),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Harness {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn the_mask_names_what_was_given_and_nothing_else() {
        let line = "update web --memory 2G --failover recreate --priority 0 --if-revision 9";
        let request = request(&Harness::try_parse_from(line.split(' ')).unwrap().arguments, "me");
        let paths = request.update_mask.unwrap().paths;
        assert_eq!(paths, ["spec.memory_mib", "spec.failover", "spec.on_disk_loss", "spec.priority"]);
        let spec = request.spec.unwrap();
        assert_eq!((spec.memory_mib, spec.priority, request.revision), (2048, 0, 9));
        assert_eq!(spec.on_disk_loss(), v1::DiskLossPolicy::Recreate);
    }
}
