// Runs what qtk.export(qmodel, "served", format="aoti") wrote, without Python:
//
//   T=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O1 examples/serve.cpp -o serve -I$T/include -I$T/include/torch/csrc/api/include
//       -L$T/lib -Wl,-rpath,$T/lib -ltorch -ltorch_cpu -lc10
//   ./serve served/model.pt2 101 7592 2088 102
//
// reads the tokens of one sentence and prints the first output: here token type, token and mask
// are the inputs, as they are of BERT; the order is what qtk.export printed.
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: serve model.pt2 TOKEN...\n";
    return 2;
  }
  std::vector<int64_t> tokens;
  for (int i = 2; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
  torch::Tensor ids = torch::tensor(tokens).unsqueeze(0);

  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  std::vector<torch::Tensor> inputs = {torch::zeros_like(ids), ids, torch::ones_like(ids)};
  torch::Tensor y = model.run(inputs)[0].flatten();

  std::cout.precision(9);
  for (int64_t i = 0; i < y.numel(); ++i) std::cout << y[i].item<float>() << "\n";
  return 0;
}
