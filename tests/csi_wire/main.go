// Prints what the published CSI and kubelet registration descriptors say of the services that clip-csi serves:
// one line per method, field and enum value, sorted, names and numbers only. Its output is kept as facts.txt;
// tests/csi_wire.rs compares our own descriptors with it, and runs this program again where Go is installed.
package main

import (
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/reflect/protoreflect"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

type collector struct {
	lines []string
	seen  map[protoreflect.FullName]bool
}

func (c *collector) say(format string, args ...any) {
	c.lines = append(c.lines, fmt.Sprintf(format, args...))
}

func (c *collector) service(s protoreflect.ServiceDescriptor) {
	for i := range s.Methods().Len() {
		m := s.Methods().Get(i)
		c.say("rpc %s %s -> %s streams %t %t", m.FullName(), m.Input().FullName(), m.Output().FullName(),
			m.IsStreamingClient(), m.IsStreamingServer())
		c.message(m.Input())
		c.message(m.Output())
	}
}

func (c *collector) message(m protoreflect.MessageDescriptor) {
	if c.seen[m.FullName()] || m.FullName().Parent() == "google.protobuf" {
		return
	}
	c.seen[m.FullName()] = true
	if !m.IsMapEntry() {
		c.say("message %s", m.FullName())
	}
	for i := range m.Fields().Len() {
		c.field(m.Fields().Get(i))
	}
}

func (c *collector) field(f protoreflect.FieldDescriptor) {
	kind, oneof := f.Kind().String(), "-"
	if f.Message() != nil {
		c.message(f.Message())
		kind = string(f.Message().FullName())
	} else if f.Enum() != nil {
		c.enum(f.Enum())
		kind = string(f.Enum().FullName())
	}
	if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() {
		oneof = string(o.Name())
	}
	c.say("field %s = %d %s %s oneof %s", f.FullName(), f.Number(), f.Cardinality(), kind, oneof)
}

func (c *collector) enum(e protoreflect.EnumDescriptor) {
	if c.seen[e.FullName()] {
		return
	}
	c.seen[e.FullName()] = true
	for i := range e.Values().Len() {
		v := e.Values().Get(i)
		c.say("value %s.%s = %d", e.FullName(), v.Name(), v.Number())
	}
}

func main() {
	c := &collector{seen: map[protoreflect.FullName]bool{}}
	for _, name := range []protoreflect.Name{"Identity", "Controller", "Node"} {
		c.service(csi.File_csi_proto.Services().ByName(name))
	}
	services := registrationFile().Services()
	for i := range services.Len() {
		c.service(services.Get(i))
	}
	slices.Sort(c.lines)
	for _, line := range c.lines {
		fmt.Println(line)
	}
}

func registrationFile() protoreflect.FileDescriptor {
	return (&registration.PluginInfo{}).ProtoReflect().Descriptor().ParentFile()
}
