package doctest

import (
	"encoding/hex"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
	"github.com/dchannel/dchannel/internal/frame"
)

// TestWireExamplesAreTheCodesBytes compares the worked example of docs/wire.md with what
// the code writes, and reads it.
func TestWireExamplesAreTheCodesBytes(t *testing.T) {
	data := frame.Begin(nil)
	for _, r := range []frame.Record{
		{Kind: frame.String, Payload: []byte("hi")},
		{Kind: frame.JSON, Payload: []byte(`{"a":1}`)},
		{Kind: frame.Custom, Codec: "gob", Headers: []string{"k", "v"}, Payload: []byte{0x00, 0xff}},
	} {
		data = frame.Append(data, r)
	}
	e := dchannel.Entry{
		Position: dchannel.Position{Epoch: 1732411111000000, Seq: 42}, Count: 3, Time: 1732411111000, Data: data,
	}
	for i := range e.ID {
		e.ID[i], e.Prev[len(e.ID)-1-i] = byte(i), byte(i)<<4
	}
	marker := dchannel.Entry{
		Position: dchannel.Position{Epoch: e.Epoch, Seq: 43}, Count: 1, Prev: e.ID, Time: e.Time + 1000, Closed: true,
	}
	for i := range marker.ID {
		marker.ID[i] = 0xff
	}
	whole := entry.Append(nil, e)

	page := read(t, "docs", "wire.md")
	line, _, _ := strings.Cut(string(whole), "\n")
	require.Contains(t, page, "\n"+line+"\n")
	require.Contains(t, page, "\n"+string(entry.Append(nil, marker)))

	var dumps [][]byte
	for _, b := range blocks(t, filepath.Join(root, "docs", "wire.md")) {
		if b.lang != "hex" {
			continue
		}
		var dump []byte
		for _, line := range strings.Split(b.code, "\n") {
			line, _, _ = strings.Cut(line, "#")
			bytes, err := hex.DecodeString(strings.Join(strings.Fields(line), ""))
			require.NoError(t, err)
			dump = append(dump, bytes...)
		}
		dumps = append(dumps, dump)
	}
	require.Equal(t, [][]byte{data, whole}, dumps)

	back, err := entry.Parse(dumps[1])
	require.NoError(t, err)
	require.Equal(t, e, back)
}

// TestWireGrammarIsTheCodes looks for the grammars in the packages' docs.
func TestWireGrammarIsTheCodes(t *testing.T) {
	page := read(t, "docs", "wire.md")
	require.Contains(t, read(t, "internal", "entry", "entry.go"), `D1 <epoch> <seq> <count> <id> <prev> <time> <m|c>\n<data>`)
	for _, rule := range []string{
		"frame   = version record…            version is the byte 0x01",
		"record  = kind [headers] [codec] size payload",
		"headers = n (key value)…             n pairs",
		"codec   = name                       only with kind 3",
	} {
		require.Contains(t, page, rule)
		require.Contains(t, read(t, "internal", "frame", "frame.go"), rule)
	}
}

// TestWireKeysAreTheDrivers looks for the drivers' keys, subjects and headers on the page.
func TestWireKeysAreTheDrivers(t *testing.T) {
	page := read(t, "docs", "wire.md")
	for _, c := range []struct{ file, code, doc string }{
		{"redis/keys.go", `k.tag + "m:" + channel`, "`{dchannel/0}:m:<channel>`"},
		{"redis/keys.go", `k.tag + "s:" + channel`, "`{dchannel/0}:s:<channel>`"},
		{"redis/keys.go", `k.tag + "c:" + channel`, "`{dchannel/0}:c:<channel>`"},
		{"redis/keys.go", `k.tag + "i"`, "`{dchannel/0}:i`"},
		{"redis/append.lua", "'h', head, 'd', data)", "field `h` has the line, newline included, field `d` the frame"},
		{"redis/append.lua", "if #data <= 4096 then", "larger than 4,096 bytes"},
		{"redis/append.lua", "'S' .. #data .. ' ' .. head", "`S`, the size of the frame in decimal, a space"},
		{"nats/names.go", `ns + ".log."`, "`<ns>.log.<channel>`"},
		{"nats/names.go", `ns + ".push."`, "`<ns>.push.<channel>`"},
		{"nats/names.go", `ns + ".meta.incarnation"`, "`<ns>.meta.incarnation`"},
		{"nats/names.go", `ns + ".meta.removed"`, "`<ns>.meta.removed`"},
		{"nats/record.go", `"Nats-Expected-Last-Subject-Sequence"`, "`Nats-Expected-Last-Subject-Sequence`"},
		{"nats/record.go", `"Dchannel-Keep"`, "`Dchannel-Keep`"},
		{"nats/record.go", `"dchannel incarnation "`, "`dchannel incarnation <32 hexadecimal digits>`"},
		{"etcd/keys.go", `namespace + "/id"`, "`<ns>/id`"},
		{"etcd/keys.go", `namespace + "/head/"`, "`<ns>/head/<channel>`"},
		{"etcd/keys.go", `"%s%016x-%016x"`, "`<ns>/log/<channel>/<epoch>-<seq>`"},
		{"etcd/keys.go", `"%s %d %d %s %c"`, "`D1 <epoch> <seq> <id> <m or c>`"},
	} {
		require.Contains(t, read(t, "backend", c.file), c.code, "has the driver changed its format? docs/wire.md says %s", c.doc)
		require.Contains(t, page, c.doc)
	}
}
