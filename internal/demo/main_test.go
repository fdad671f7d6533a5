package main

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestDemoEndsWithItsCheck(t *testing.T) {
	demo := filepath.Join(t.TempDir(), "demo")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", demo, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, backend := range []string{"memory", "redis", "nats", "etcd"} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			out, err := exec.CommandContext(t.Context(), demo, "-backend", backend, "-messages", "300").CombinedOutput()
			require.NoError(t, err, "%s", out)
			assert.Contains(t, string(out), "checked: 600 messages for each of 4 listeners, none lost, none twice, one order, one close")
		})
	}
	for _, bad := range [][]string{{"-backend", "kafka"}, {"-messages", "0"}, {"now"}} {
		out, err := exec.CommandContext(t.Context(), demo, bad...).CombinedOutput()
		assert.Error(t, err)
		assert.Contains(t, string(out), "demo: ")
	}
}
